"""What a client was told of its requests, held against the oracle the moment it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drumline.engine.core.config import CoreConfig
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import LogprobEntry, StreamEnd, Submit
from tests.simulation.oracle import Expected, expected_output
from tests.simulation.worker import RuleBrokenError


@dataclass(slots=True)
class Wanted:
    """One request and what its client will do to it. Times are virtual seconds; negative means never.

    ``stop_after``: the client finds a stop string after so many tokens of index 0 (0: never). ``poison``: it kills
    every rank that computes it. ``not_finite``: its logits are NaN. ``client``: who submits it.
    """

    submit: Submit
    client: int
    at: float
    cancel_at: float = -1.0
    stop_after: int = 0
    poison: bool = False
    not_finite: bool = False


@dataclass(slots=True)
class Stream:
    """One sequence. ``tokens`` as they were read; ``stopped_at``: where its client found a stop string, else -1."""

    expected: Expected
    tokens: list[int] = field(default_factory=list)
    logprobs: int = 0
    stopped_at: int = -1
    end: StreamEnd | None = None

    @property
    def read(self) -> int:
        """How many tokens its client has and wants: none behind its stop string."""
        return min(len(self.tokens), self.stopped_at) if self.stopped_at > 0 else len(self.tokens)


@dataclass(slots=True)
class Asked:
    """One request as its client knows it. ``over``: nothing more is expected of it. ``lost``: its client has gone
    without it, so that it may end in any way. ``forgot``: its client was started anew and knows its id alone.
    ``longest_pause``: most seconds between two frames with tokens of it."""

    wanted: Wanted
    call_id: int = 0
    sent: int = 0
    seed: int = -1
    accepted: bool = False
    ever_accepted: bool = False
    rejected: bool = False
    cancel_calls: set[int] = field(default_factory=set)
    cancelled: bool = False
    failed: ErrorInfo | None = None
    lost: bool = False
    forgot: bool = False
    resumes: int = 0
    heard_at: float = -1.0
    longest_pause: float = 0.0
    streams: list[Stream] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.wanted.submit.request_id

    @property
    def ended(self) -> bool:
        return bool(self.streams) and all(stream.end is not None for stream in self.streams)

    @property
    def over(self) -> bool:
        cancel_done = self.cancelled or not self.cancel_calls
        return self.rejected or self.failed is not None or self.lost or (self.ended and cancel_done)

    def accept(self, config: CoreConfig, seed: int, num_blocks: int) -> None:
        """The engine has taken it in with ``seed``."""
        if self.ever_accepted and seed != self.seed:
            self.broken(f"was accepted with seed {self.seed} and then with {seed}")
        self.accepted = True
        if self.ever_accepted:
            return
        self.ever_accepted, self.seed = True, seed
        submit = self.wanted.submit
        stops = frozenset(submit.sampling.stop_token_ids)
        if not submit.ignore_eos:
            stops |= frozenset(config.eos_token_ids)
        prompt = submit.prompt.tolist()
        room = min(config.max_model_len, num_blocks * config.block_size + 1) - len(prompt)
        limit = min(submit.max_tokens, room)
        least = submit.sampling.min_tokens
        self.streams = [
            Stream(expected_output(prompt, seed, index, stops, least, limit, config.vocab_size))
            for index in range(submit.n)
        ]

    def heard(self, now: float) -> None:
        """Tokens of it have come."""
        if self.heard_at >= 0:
            self.longest_pause = max(self.longest_pause, now - self.heard_at)
        self.heard_at = now

    def token(self, index: int, position: int, token: int, entry: LogprobEntry | None) -> bool:
        """One token arrives. Returns whether tokens are missing before it."""
        stream = self.streams[index]
        if position < len(stream.tokens):
            if stream.tokens[position] != token:
                self.broken(f"token {token} at {position} of {index} was {stream.tokens[position]} before")
            return False
        if position > len(stream.tokens):
            return True
        if stream.end is not None:
            if stream.stopped_at > 0:
                # A coordinator that took it over from the client's tokens does not know that it was stopped.
                return False
            self.broken(f"token {token} at {position} of {index} after its end {stream.end}")
        if stream.expected.tokens[position : position + 1] != (token,):
            self.broken(f"token {token} at {position} of {index}, expected {stream.expected}")
        if self.wanted.submit.sampling.logprobs >= 0:
            if entry is None or entry.token != token:
                self.broken(f"token {token} at {position} of {index} comes with {entry}")
            stream.logprobs += 1
        stream.tokens.append(token)
        return False

    def ends(self, end: StreamEnd) -> bool:
        """A sequence has ended. Returns whether tokens are missing."""
        stream = self.streams[end.index]
        if stream.end is not None:
            same = (stream.end.reason, stream.end.stop_token, stream.end.num_tokens)
            if same != (end.reason, end.stop_token, end.num_tokens):
                self.broken(f"{end.index} ended with {stream.end} and then with {end}")
            return False
        if len(stream.tokens) < end.num_tokens:
            return True
        self._check_end(stream, end)
        stream.end = end
        return False

    def _check_end(self, stream: Stream, end: StreamEnd) -> None:
        expected = stream.expected
        if end.reason == "abort":
            if not self.cancel_calls:
                self.broken(f"{end} and nobody cancelled it")
        elif 0 < end.num_tokens == stream.stopped_at and end.stop_token == -1 and end.reason == "stop":
            del stream.tokens[end.num_tokens :]
        elif (end.reason, end.stop_token, end.num_tokens) != (
            (expected.reason, expected.stop_token, len(expected.tokens))
        ) or len(stream.tokens) != len(expected.tokens):
            self.broken(f"{end} after {len(stream.tokens)} tokens, expected {expected}")

    def resumed(self, tokens: Sequence[Sequence[int]], logprobs: Sequence[int], ends: Sequence[StreamEnd]) -> None:
        """All that the engine knows of it; no less than was read before."""
        if len(tokens) != len(self.streams):
            self.broken(f"resumed with {len(tokens)} sequences of {len(self.streams)}")
        ended = {end.index: end for end in ends}
        for index, (stream, got) in enumerate(zip(self.streams, tokens, strict=True)):
            if tuple(got) != stream.expected.tokens[: len(got)]:
                self.broken(f"{index} is resumed with {list(got)}, expected {stream.expected}")
            end = ended.get(index)
            if len(got) < len(stream.tokens) and (end is None or end.num_tokens != len(got)):
                self.broken(f"{index} is resumed with {len(got)} tokens, {len(stream.tokens)} were told before")
            if self.wanted.submit.sampling.logprobs >= 0 and logprobs[index] != len(got):
                self.broken(f"{index} is resumed with {logprobs[index]} logprobs for {len(got)} tokens")
            if stream.end is None:
                stream.tokens = list(got)
            if end is not None:
                self.ends(end)

    def broken(self, what: str) -> None:
        """A promise to the client is broken."""
        raise RuleBrokenError(f"request {self.request_id}: {what}")
