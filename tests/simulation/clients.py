"""Clients as the simulation sees them: what they were told, checked against the oracle the moment they are told it."""

from __future__ import annotations

from dataclasses import dataclass, field

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.messages import Accepted, Resumed, StreamEnd
from tests.simulation.oracle import Expected, expected_output
from tests.simulation.scenario import Plan
from tests.simulation.worker import RuleBrokenError


@dataclass(slots=True)
class Stream:
    """One sequence of an accepted request. ``stopped_at``: where its client found a stop string, else -1.
    ``end_told_twice``: its end stood in a Resumed and may come once more."""

    name: str
    expected: Expected
    position: int = 0
    stopped_at: int = -1
    end: StreamEnd | None = None
    end_told_twice: bool = False


@dataclass(slots=True)
class Client:
    """One accepted request."""

    plan: Plan
    connection: int
    streams: list[Stream]
    seed: int = 0
    dropped: bool = False
    cancel_calls: set[int] = field(default_factory=set)
    forgotten: bool = False

    @property
    def ended(self) -> bool:
        return self.dropped or all(stream.end is not None for stream in self.streams)


class Clients:
    """All accepted requests by id, and streams by (connection, handle)."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self.requests: dict[str, Client] = {}
        self._streams: dict[tuple[int, int], tuple[Client, Stream]] = {}

    def accepted(self, plan: Plan, answer: Accepted, num_blocks: int) -> Client:
        """``num_blocks``: KV blocks of the replica that serves it."""
        submit, config = plan.submit, self._config
        stops = frozenset(submit.sampling.stop_token_ids)
        if not submit.ignore_eos:
            stops |= frozenset(config.eos_token_ids)
        prompt = submit.prompt.tolist()
        room = min(config.max_model_len, num_blocks * config.block_size + 1) - len(prompt)
        limit = min(submit.max_tokens, room)
        streams = [
            Stream(
                f"{submit.request_id}/{index}",
                expected_output(
                    prompt, answer.seed, index, stops, submit.sampling.min_tokens, limit, config.vocab_size
                ),
            )
            for index in range(submit.n)
        ]
        client = Client(plan, plan.connection, streams, answer.seed)
        self.requests[submit.request_id] = client
        self._register(client, answer.handles.tolist())
        return client

    def resumed(self, client: Client, connection: int, answer: Resumed) -> None:
        """What Resumed says is what the oracle says, and no less than what was delivered."""
        client.connection = connection
        self._register(client, answer.handles.tolist())
        for stream, tokens in zip(client.streams, answer.tokens, strict=True):
            got = tuple(tokens.tolist())
            complete = len(got) >= stream.position if stream.end is None else len(got) == stream.end.num_tokens
            if got != stream.expected.tokens[: len(got)] or not complete:
                raise RuleBrokenError(
                    f"{stream.name}: resumed with {got}, {stream.position} tokens of {stream.expected}"
                )
            stream.position = max(stream.position, len(got))

    def rehandled(self, client: Client, handles: list[int]) -> None:
        """The request was accepted once more."""
        self._register(client, handles)

    def told_ends(self, client: Client, answer: Resumed) -> None:
        """Ends that stand in a Resumed. What a client reads behind a stop or a cancel of its own it drops."""
        for end in answer.ends:
            stream = client.streams[end.index]
            if stream.end is None:
                self._end(client.connection, end)
            stream.end_told_twice = True

    def read(self, output: ConnectionOutput) -> list[tuple[Client, Stream]]:
        """Takes one connection's outputs. Returns the streams that got tokens."""
        touched: list[tuple[Client, Stream]] = []
        asked: list[int] = []
        for i, (handle, position, token) in enumerate(
            zip(output.handles.tolist(), output.positions.tolist(), output.tokens.tolist(), strict=True)
        ):
            client, stream = self._find(output.connection, handle)
            if position < stream.position:
                if not client.plan.resume_at >= 0:
                    raise RuleBrokenError(f"{stream.name}: position {position} is repeated")
                continue
            if position > stream.position or stream.end is not None:
                raise RuleBrokenError(f"{stream.name}: position {position} comes after {stream.position} tokens")
            if stream.expected.tokens[position : position + 1] != (token,):
                raise RuleBrokenError(f"{stream.name}: token {token} at {position}, expected {stream.expected}")
            stream.position += 1
            touched.append((client, stream))
            if client.plan.submit.sampling.logprobs >= 0:
                asked.append(i)
        self._check_logprobs(output, asked)
        for end in output.ends:
            self._end(output.connection, end)
        return touched

    def _check_logprobs(self, output: ConnectionOutput, asked: list[int]) -> None:
        index = output.logprob_index.tolist()
        if not set(asked) <= set(index) or len(index) != len(output.logprobs):
            raise RuleBrokenError(f"connection {output.connection}: logprobs at {index}, asked for at {asked}")
        for place, entry in zip(index, output.logprobs, strict=True):
            if entry.token != output.tokens[place]:
                raise RuleBrokenError(f"connection {output.connection}: logprob of {entry.token} at token {place}")

    def _end(self, connection: int, end: StreamEnd) -> None:
        client, stream = self._find(connection, end.handle)
        if stream.end is not None:
            if stream.end_told_twice and (end.reason, end.num_tokens) == (stream.end.reason, stream.end.num_tokens):
                return
            raise RuleBrokenError(f"{stream.name} ends twice")
        stream.end = end
        expected = stream.expected
        if end.reason == "abort":
            if not client.cancel_calls or end.num_tokens != stream.position:
                raise RuleBrokenError(
                    f"{stream.name}: {end} after {stream.position} tokens, cancels {client.cancel_calls}"
                )
        elif end.num_tokens == stream.stopped_at and end.stop_token == -1 and end.reason == "stop":
            return
        elif (end.reason, end.stop_token, end.num_tokens) != (
            expected.reason,
            expected.stop_token,
            len(expected.tokens),
        ) or stream.position != len(expected.tokens):
            raise RuleBrokenError(f"{stream.name}: {end} after {stream.position} tokens, expected {expected}")

    def _register(self, client: Client, handles: list[int]) -> None:
        for handle, stream in zip(handles, client.streams, strict=True):
            known = self._streams.setdefault((client.connection, handle), (client, stream))
            if known[1] is not stream:
                raise RuleBrokenError(f"{stream.name}: handle {handle} is that of {known[1].name}")

    def _find(self, connection: int, handle: int) -> tuple[Client, Stream]:
        found = self._streams.get((connection, handle))
        if found is None or found[0].dropped:
            raise RuleBrokenError(f"connection {connection} knows no stream {handle}")
        return found
