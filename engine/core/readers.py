"""Who is told about a request: the connection that submitted it, whoever resumed it since, or nobody for a while."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import msgspec

from drumline.engine.core.intake import Intake
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.notes import NotePad
from drumline.engine.core.register import Register
from drumline.engine.core.request import Request
from drumline.protocol.errors import DrumlineError, InvalidRequest
from drumline.protocol.messages import Rejected, Resume, Resumed

NOBODY = 0
"""The connection of requests that nobody reads: their outputs are for the journal alone."""
MAX_RETAINED = 16384
"""Ended requests that nobody reads are kept for their client to come back; of more than so many the oldest go."""


class Readers:
    """Moves requests from one reader to the next. ``window_s``: how long one without a reader is kept."""

    def __init__(
        self,
        groups: Ordered[LockstepGroup],
        register: Register,
        intake: Intake,
        notes: NotePad,
        window_s: float,
    ) -> None:
        self._groups = groups
        self._register = register
        self._intake = intake
        self._notes = notes
        self._window_s = window_s

    def move(self, request: Request, connection: int) -> None:
        """``connection`` reads the request from now on, under new handles."""
        self._register.move(request, connection)
        for sequence in request.sequences:
            sequence.stream = self._intake.next_handle()
            if sequence.end is not None:
                sequence.end = msgspec.structs.replace(sequence.end, handle=sequence.stream)
        self._notes.rehandle(request)
        self._address_rows(request)

    def detach(self, request: Request, now: float) -> None:
        """Nobody reads the request. Its handles stay."""
        self._register.move(request, NOBODY)
        request.expires_at = now + self._window_s
        self._address_rows(request)

    def expired(self, now: float) -> list[Request]:
        """Requests without a reader whose time is over."""
        kept = self._register.of(NOBODY)
        if not kept:
            return []
        over = [request for request in kept if request.expires_at <= now]
        ended = [request for request in kept if request.unended == 0 and request.expires_at > now]
        return over + ended[: max(len(ended) - MAX_RETAINED, 0)]

    def _address_rows(self, request: Request) -> None:
        table = self._groups[request.group].table
        for sequence in request.sequences:
            if sequence.row >= 0:
                table.connection[sequence.row] = request.connection
                table.stream[sequence.row] = sequence.stream

    # ---------------------------------------------------------------------------------------------------------- resume

    def resume(self, connection: int, msg: Resume) -> Resumed | Rejected:
        """Every generated token so far. The request moves to ``connection``, with new handles, if it is another's.
        Rejected when the id is not known, the request has failed, or the positions do not fit its sequences; none mean
        the start."""
        request = self._register.by_id.get(msg.request_id)
        try:
            if request is None:
                raise InvalidRequest("request_id", msg.request_id, "the id of a request that has not been forgotten")
            if request.failed is not None:
                raise DrumlineError(request.failed.text, request.failed)
            self._check_positions(request, msg.positions)
        except DrumlineError as error:
            return Rejected(msg.call_id, msg.request_id, error.info)
        if connection != request.connection:
            self.move(request, connection)
        group = self._groups[request.group]
        first = len(request.prompt)
        return Resumed(
            msg.call_id,
            msg.request_id,
            request.prompt,
            request.handles,
            tuple(group.known_tokens(sequence)[first:] for sequence in request.sequences),
            tuple(sequence.end for sequence in request.sequences if sequence.end is not None),
            tuple(tuple(sequence.logprobs) for sequence in request.sequences),
            request.submit.client_params,
            request.sampling.seed,
            request.submit.max_tokens,
        )

    def _check_positions(self, request: Request, positions: Ordered[int]) -> None:
        if not positions:
            return
        if len(positions) != len(request.sequences):
            raise InvalidRequest("positions", list(positions), f"{len(request.sequences)} positions, one per index")
        group = self._groups[request.group]
        for sequence, position in zip(request.sequences, positions, strict=True):
            generated = group.num_known(sequence) - len(request.prompt)
            if not 0 <= position <= generated and (position < 0 or sequence.end is None):
                raise InvalidRequest("positions", position, f"0 to {generated} for index {sequence.index}")
