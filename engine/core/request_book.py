"""Live requests from their submission until they are forgotten, and what is told to whom about their ends."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from drumline.engine.core.admission import check_rank, check_submit
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.confinement import Confinement
from drumline.engine.core.dispatch import Dispatch
from drumline.engine.core.intake import Intake
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.notes import NotePad
from drumline.engine.core.outputs import Outbox
from drumline.engine.core.prefix_cache import PrefixHasher
from drumline.engine.core.readers import NOBODY, Readers
from drumline.engine.core.register import Register
from drumline.engine.core.request import Place, Request, Sequence
from drumline.engine.core.results import Ending
from drumline.engine.core.takeover import TakeOver
from drumline.protocol.errors import DrumlineError, DuplicateRequest, ErrorInfo, QueueFull
from drumline.protocol.messages import Accepted, Cancel, Rejected, Stop, StreamEnd, Submit
from drumline.protocol.status import RequestCounts


class RequestBook:
    """Requests from their submission until they are forgotten. The first terminal event of a sequence wins.

    ``random`` draws the seeds of requests without one.
    """

    def __init__(
        self, config: CoreConfig, groups: list[LockstepGroup], hasher: PrefixHasher | None, random: np.random.Generator
    ) -> None:
        self.outbox = Outbox()
        self.notes = NotePad()
        self.register = Register()
        self.ignored_stops = 0
        self._config = config
        self._groups = groups
        self.dispatch = Dispatch(config, groups)
        self._intake = Intake(config, self.dispatch, hasher, random)
        self.readers = Readers(groups, self.register, self._intake, self.notes, config.resume_window_s)
        self.takeover = TakeOver(self, config, groups, self._intake)
        self._accepted = self._finished = self._cancelled = self._failed = 0

    def counts(self) -> RequestCounts:
        """Requests since the start of the term, those that were taken over included. One that lost a sequence to an
        abort counts as cancelled."""
        return RequestCounts(self._accepted, self._finished, self._cancelled, self._failed)

    # ----------------------------------------------------------------------------------------------------------- submit

    def submit(self, connection: int, msg: Submit) -> Accepted | Rejected:
        """Takes a request in, its sequences waiting on one replica. What the checks raise comes back as Rejected.

        The same submission once more, known by its nonce, is answered again: the request goes on under new handles on
        ``connection``.
        """
        known = self.register.by_id.get(msg.request_id)
        if known is not None and msg.nonce and msg.nonce == known.submit.nonce:
            return self._submit_again(known, connection, msg)
        try:
            self._check(msg)
        except DrumlineError as error:
            return Rejected(msg.call_id, msg.request_id, error.info)
        request = self._intake.make(connection, msg)
        self.accept(request)
        return Accepted(msg.call_id, msg.request_id, request.handles, request.sampling.seed)

    def _submit_again(self, request: Request, connection: int, msg: Submit) -> Accepted | Rejected:
        if request.failed is not None:
            return Rejected(msg.call_id, msg.request_id, request.failed)
        self.readers.move(request, connection)
        for sequence in request.sequences:
            if sequence.end is not None:
                self.outbox.add_end(connection, sequence.end)
        cached = max(request.sequences[0].num_cached, 0)
        return Accepted(msg.call_id, msg.request_id, request.handles, request.sampling.seed, cached)

    def _check(self, msg: Submit) -> None:
        self.check_fields(msg)
        if msg.request_id in self.register.by_id:
            raise DuplicateRequest(f"request id {msg.request_id!r} is live already")
        waiting, most = self.waiting, self._config.max_waiting
        if waiting + msg.n > most:
            raise QueueFull(f"{waiting} sequences wait and {msg.n} more were submitted; max_waiting is {most}")

    def check_fields(self, msg: Submit) -> None:
        """Raises :class:`~drumline.protocol.errors.InvalidRequest` for a submission that cannot be served."""
        check_rank(self._config, msg.data_parallel_rank)
        wished = self.dispatch.kv_tokens[self.dispatch.wished(msg.data_parallel_rank)]
        check_submit(self._config, msg, int(wished.max()))

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        queued = sum(len(queue) for group in self._groups for queue in group.scheduler.waiting)
        return queued + self.dispatch.held_sequences

    def accept(self, request: Request) -> None:
        """The request is known, and waits."""
        self.register.add(request)
        self.notes.accept(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """What has not ended of a request that is known from now on waits."""
        if request.unended:
            self._accepted += 1
            self.dispatch.enqueue(request)

    # --------------------------------------------------------------------------------------------------------- ends

    def stop(self, connection: int, msg: Stop) -> None:
        """Ends a sequence after ``num_tokens`` generated tokens, unless it has ended. What does not name tokens of a
        request of this connection is counted in ``ignored_stops``."""
        request = self.register.by_id.get(msg.request_id)
        if request is None or request.connection != connection or not 0 <= msg.index < len(request.sequences):
            self.ignored_stops += 1
            return
        sequence = request.sequences[msg.index]
        if sequence.place is Place.ENDED:
            return
        generated = self._groups[request.group].num_known(sequence) - len(request.prompt)
        if not 0 < msg.num_tokens <= generated:
            self.ignored_stops += 1
            return
        self._groups[request.group].end(sequence)
        self.ended(sequence, "stop", -1, msg.num_tokens)

    def cancel(self, connection: int, msg: Cancel) -> None:
        """Aborts what is left of a request. Confirmed once no row is held, at once for an id that is not known."""
        request = self.register.by_id.get(msg.request_id)
        if request is None:
            self.outbox.add_cancelled(connection, msg.call_id, msg.request_id)
            return
        request.cancels.append((connection, msg.call_id))
        self._abort(request)
        self._confirm(request)

    def drop_connection(self, connection: int, now: float) -> None:
        """Durable requests go on without a reader; all others are aborted and forgotten. Nothing collected so far goes
        to the connection any more."""
        kept: list[int] = []
        for request in self.register.of(connection):
            if request.submit.durable:
                self.readers.detach(request, now)
                kept.extend(sequence.stream for sequence in request.sequences)
            else:
                self._abort(request)
                self._remove(request)
        self.outbox.drop(connection, kept)

    def tick(self, now: float) -> None:
        """Requests that nobody has come back for are aborted and forgotten."""
        for request in self.readers.expired(now):
            self._abort(request)
            self._remove(request)

    def fail(self, request_id: str, error: ErrorInfo) -> None:
        """Ends what is left of a request, without a StreamEnd, and tells its client. One that nobody reads is kept to
        be told who comes back. One that has ended, or is not known, stays as it is."""
        request = self.register.by_id.get(request_id)
        if request is None or request.unended == 0:
            return
        self._give_up(request)
        request.failed = error
        if request.connection != NOBODY:
            self.outbox.add_failed(request.connection, request_id, error)
            self._remove(request)
        else:
            self.notes.forget(request_id)

    def fail_all(self) -> list[tuple[int, str]]:
        """Ends and forgets every request that has not ended, without a StreamEnd. Returns (connection, request id) of
        each, for the caller to tell why."""
        failed = [request for request in self.register.by_id.values() if request.unended]
        for request in failed:
            self._give_up(request)
            self._remove(request)
        return [(request.connection, request.request_id) for request in failed]

    def _give_up(self, request: Request) -> None:
        for sequence in request.live:
            self._groups[request.group].end(sequence)
        request.unended = 0
        self.dispatch.ended(request)
        self._failed += 1

    def endings(self, endings: list[Ending]) -> None:
        """Sequences that ended by themselves and have left their rows."""
        for ending in endings:
            sequence = ending.sequence
            generated = len(sequence.tokens) - len(sequence.request.prompt)
            self.ended(sequence, ending.reason, ending.stop_token, generated)

    def rows_freed(self, sequences: list[Sequence]) -> bool:
        """These sequences hold no row any more. Whether requests have gone to other replicas therefore."""
        for sequence in sequences:
            self._confirm(sequence.request)
        return bool(sequences) and self.dispatch.rows_freed()

    def _abort(self, request: Request) -> None:
        for sequence in request.live:
            self._groups[request.group].end(sequence)
            request.aborted = True
            self.ended(sequence, "abort", -1, len(sequence.tokens) - len(request.prompt))

    def ended(self, sequence: Sequence, reason: str, stop_token: int, num_tokens: int) -> None:
        """A sequence that has left its row is over after ``num_tokens`` generated tokens."""
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
            self.dispatch.ended(request)
            if request.aborted:
                self._cancelled += 1
            else:
                self._finished += 1

    def _confirm(self, request: Request) -> None:
        if request.cancels and request.rows_held == 0:
            for connection, call_id in request.cancels:
                self.outbox.add_cancelled(connection, call_id, request.request_id)
            request.cancels.clear()

    def forget(self, request_id: str) -> None:
        """The id is free again. A request that has not ended stays."""
        request = self.register.by_id.get(request_id)
        if request is not None and request.unended == 0:
            # A cancel that still waits for a row is confirmed all the same: the row's sequence leads to the request.
            self._remove(request)

    def _remove(self, request: Request) -> None:
        self.register.remove(request)
        self.notes.forget(request.request_id)

    # ------------------------------------------------------------------------------------------------------- suspicion

    def told_tokens(self, request_ids: Collection[str]) -> dict[str, int]:
        """By id of those that have not ended: how many tokens the sequence with fewest, of what has not ended, has."""
        told: dict[str, int] = {}
        for request_id in request_ids:
            request = self.register.by_id.get(request_id)
            if request is not None and request.unended:
                group = self._groups[request.group]
                known = min(group.num_known(sequence) for sequence in request.live)
                told[request_id] = known - len(request.prompt)
        return told

    def confine(self, confinement: Confinement) -> None:
        """Rows that must be left are left; what can go elsewhere does so once they are free."""
        self.dispatch.confine(confinement, self.register.by_id.values())
