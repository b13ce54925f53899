"""Who asked for what: live requests by id and connection, and what is told to whom about their ends."""

from __future__ import annotations

import msgspec
import numpy as np

from drumline.engine.core.admission import check_rank, check_submit
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.dispatch import Dispatch
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.outputs import Outbox
from drumline.engine.core.prefix_cache import PrefixHasher
from drumline.engine.core.request import Place, Request, Sequence
from drumline.engine.core.results import Ending
from drumline.protocol.errors import DrumlineError, DuplicateRequest, InvalidRequest, QueueFull
from drumline.protocol.messages import Accepted, Cancel, Rejected, Resume, Resumed, Stop, StreamEnd, Submit
from drumline.protocol.status import RequestCounts


class RequestBook:
    """Requests from their submission until they are forgotten. The first terminal event of a sequence wins.

    ``random`` draws the seeds of requests without one. Stream handles are numbers that are never used again in the
    term.
    """

    def __init__(
        self, config: CoreConfig, groups: list[LockstepGroup], hasher: PrefixHasher | None, random: np.random.Generator
    ) -> None:
        self.outbox = Outbox()
        self.ignored_stops = 0
        self._config = config
        self._groups = groups
        self._hasher = hasher
        self._random = random
        self.dispatch = Dispatch(config, groups)
        self._requests: dict[str, Request] = {}
        self._connections: dict[int, dict[str, Request]] = {}
        self._arrivals = 0
        self._streams = 0
        self._accepted = self._finished = self._cancelled = self._failed = 0

    def counts(self) -> RequestCounts:
        """Requests since the start of the term. One that lost a sequence to an abort counts as cancelled."""
        return RequestCounts(self._accepted, self._finished, self._cancelled, self._failed)

    # ----------------------------------------------------------------------------------------------------------- submit

    def submit(self, connection: int, msg: Submit) -> Accepted | Rejected:
        """Takes a request in, its sequences waiting on one replica. What the checks raise comes back as Rejected."""
        try:
            request = self._admit(connection, msg)
        except DrumlineError as error:
            return Rejected(msg.call_id, msg.request_id, error.info)
        self._requests[request.request_id] = request
        self._connections.setdefault(connection, {})[request.request_id] = request
        self._accepted += 1
        for sequence in request.sequences:
            self._groups[request.group].add(sequence)
        handles = np.asarray([sequence.stream for sequence in request.sequences], dtype=np.int32)
        return Accepted(msg.call_id, msg.request_id, handles, request.sampling.seed)

    def _admit(self, connection: int, msg: Submit) -> Request:
        config = self._config
        check_rank(config, msg.data_parallel_rank)
        dispatch = self.dispatch
        check_submit(config, msg, int(dispatch.kv_tokens[dispatch.wished(msg.data_parallel_rank)].max()))
        if msg.request_id in self._requests:
            raise DuplicateRequest(f"request id {msg.request_id!r} is live already")
        waiting = sum(len(queue) for group in self._groups for queue in group.scheduler.waiting)
        if waiting + msg.n > config.max_waiting:
            raise QueueFull(
                f"{waiting} sequences wait and {msg.n} more were submitted; max_waiting is {config.max_waiting}"
            )
        prompt = np.ascontiguousarray(msg.prompt)
        states = None if self._hasher is None else self._hasher.states(prompt)
        replica = dispatch.choose(prompt, states, msg.data_parallel_rank)
        seed = msg.sampling.seed if msg.seed_given else int(self._random.integers(0, 2**63 - 1))
        stops = dict.fromkeys(msg.sampling.stop_token_ids)
        if not msg.ignore_eos:
            stops |= dict.fromkeys(config.eos_token_ids)
        group, local = divmod(replica, self._groups[0].replicas)
        request = Request(
            request_id=msg.request_id,
            connection=connection,
            sampling=msgspec.structs.replace(msg.sampling, seed=seed, stop_token_ids=tuple(stops)),
            prompt=prompt,
            group=group,
            priority=msg.priority,
            prefix=states,
            unended=msg.n,
        )
        # The last token needs no KV entry: a sequence alone in the pool may reach one token more than the blocks hold.
        longest = min(len(prompt) + msg.max_tokens, config.max_model_len, int(dispatch.kv_tokens[replica]) + 1)
        for index in range(msg.n):
            sequence = Sequence(request, index, self._next_stream(), self._arrivals, local, prompt, longest)
            self._arrivals += 1
            request.sequences.append(sequence)
        return request

    def _next_stream(self) -> int:
        self._streams += 1
        return self._streams

    # --------------------------------------------------------------------------------------------------------- ends

    def stop(self, connection: int, msg: Stop) -> None:
        """Ends a sequence after ``num_tokens`` generated tokens, unless it has ended. What does not name tokens of a
        request of this connection is counted in ``ignored_stops``."""
        request = self._requests.get(msg.request_id)
        if request is None or request.connection != connection or not 0 <= msg.index < len(request.sequences):
            self.ignored_stops += 1
            return
        sequence = request.sequences[msg.index]
        if sequence.place is Place.ENDED:
            return
        generated = len(self._groups[request.group].known_tokens(sequence)) - len(request.prompt)
        if not 0 < msg.num_tokens <= generated:
            self.ignored_stops += 1
            return
        self._groups[request.group].end(sequence)
        self._ended(sequence, "stop", -1, msg.num_tokens)

    def cancel(self, connection: int, msg: Cancel) -> None:
        """Aborts what is left of a request. Confirmed once no row is held, at once for an id that is not known."""
        request = self._requests.get(msg.request_id)
        if request is None:
            self.outbox.add_cancelled(connection, msg.call_id, msg.request_id)
            return
        request.cancels.append((connection, msg.call_id))
        self._abort(request)
        self._confirm(request)

    def drop_connection(self, connection: int) -> None:
        """Aborts and forgets all its requests; nothing collected so far goes to it any more."""
        for request in list(self._connections.pop(connection, {}).values()):
            self._abort(request)
            del self._requests[request.request_id]
        self.outbox.drop(connection)

    def fail_all(self) -> list[tuple[int, str]]:
        """Ends and forgets every request that has not ended, without a StreamEnd. Returns (connection, request id) of
        each, for the caller to tell why."""
        failed: list[tuple[int, str]] = []
        for request in list(self._requests.values()):
            if request.unended == 0:
                continue
            for sequence in self._live(request):
                self._groups[request.group].end(sequence)
            request.unended = 0
            self._failed += 1
            self._remove(request)
            failed.append((request.connection, request.request_id))
        return failed

    def endings(self, endings: list[Ending]) -> None:
        """Sequences that ended by themselves and have left their rows."""
        for ending in endings:
            sequence = ending.sequence
            generated = len(sequence.tokens) - len(sequence.request.prompt)
            self._ended(sequence, ending.reason, ending.stop_token, generated)

    def rows_freed(self, sequences: list[Sequence]) -> None:
        """These sequences hold no row any more."""
        for sequence in sequences:
            self._confirm(sequence.request)

    def _abort(self, request: Request) -> None:
        for sequence in self._live(request):
            group = self._groups[request.group]
            group.end(sequence)
            request.aborted = True
            self._ended(sequence, "abort", -1, len(sequence.tokens) - len(request.prompt))

    def _live(self, request: Request) -> list[Sequence]:
        return [sequence for sequence in request.sequences if sequence.place is not Place.ENDED]

    def _ended(self, sequence: Sequence, reason: str, stop_token: int, num_tokens: int) -> None:
        request = sequence.request
        sequence.tokens = sequence.tokens[: len(request.prompt) + num_tokens]
        del sequence.logprobs[num_tokens:]
        cached = max(sequence.num_cached, 0)
        sequence.end = StreamEnd(
            sequence.stream, request.request_id, sequence.index, reason, stop_token, num_tokens, cached
        )
        self.outbox.add_end(request.connection, sequence.end)
        request.unended -= 1
        if request.unended == 0:
            if request.aborted:
                self._cancelled += 1
            else:
                self._finished += 1

    def _confirm(self, request: Request) -> None:
        if request.cancels and request.rows_held == 0:
            for connection, call_id in request.cancels:
                self.outbox.add_cancelled(connection, call_id, request.request_id)
            request.cancels.clear()

    # ----------------------------------------------------------------------------------------------- resume and forget

    def resume(self, connection: int, msg: Resume) -> Resumed | Rejected:
        """Every generated token so far. The request moves to ``connection``, with new handles, if it is another's.
        Rejected when the id is not known or the positions do not fit its sequences."""
        try:
            request = self._resumable(msg)
        except DrumlineError as error:
            return Rejected(msg.call_id, msg.request_id, error.info)
        group = self._groups[request.group]
        if connection != request.connection:
            self._move(request, connection)
        first = len(request.prompt)
        return Resumed(
            msg.call_id,
            msg.request_id,
            request.prompt,
            np.asarray([sequence.stream for sequence in request.sequences], dtype=np.int32),
            tuple(group.known_tokens(sequence)[first:] for sequence in request.sequences),
            tuple(sequence.end for sequence in request.sequences if sequence.end is not None),
            tuple(tuple(sequence.logprobs) for sequence in request.sequences),
        )

    def forget(self, request_id: str) -> None:
        """The id is free again. A request that has not ended stays."""
        request = self._requests.get(request_id)
        if request is not None and request.unended == 0:
            # A cancel that still waits for a row is confirmed all the same: the row's sequence leads to the request.
            self._remove(request)

    def _resumable(self, msg: Resume) -> Request:
        request = self._requests.get(msg.request_id)
        if request is None:
            raise InvalidRequest("request_id", msg.request_id, "the id of a request that has not been forgotten")
        if len(msg.positions) != len(request.sequences):
            raise InvalidRequest("positions", list(msg.positions), f"{len(request.sequences)} positions, one per index")
        group = self._groups[request.group]
        for sequence, position in zip(request.sequences, msg.positions, strict=True):
            generated = len(group.known_tokens(sequence)) - len(request.prompt)
            if not 0 <= position <= generated:
                raise InvalidRequest("positions", position, f"0 to {generated} for index {sequence.index}")
        return request

    def _move(self, request: Request, connection: int) -> None:
        table = self._groups[request.group].table
        self._connections.get(request.connection, {}).pop(request.request_id, None)
        self._connections.setdefault(connection, {})[request.request_id] = request
        request.connection = connection
        for sequence in request.sequences:
            sequence.stream = self._next_stream()
            if sequence.end is not None:
                sequence.end = msgspec.structs.replace(sequence.end, handle=sequence.stream)
            if sequence.row >= 0:
                table.connection[sequence.row] = connection
                table.stream[sequence.row] = sequence.stream

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        live = self._connections.get(request.connection)
        if live is not None:
            live.pop(request.request_id, None)
            if not live:
                del self._connections[request.connection]
