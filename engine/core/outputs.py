"""What has to be told to clients since it was last asked for, sorted by connection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.block_pool import I32
from drumline.engine.core.results import Emission
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import NO_NUMBERS, LogprobEntry, StreamEnd


@dataclass(slots=True)
class ConnectionOutput:
    """Everything new for one connection. Entry i of ``handles``, ``positions`` and ``tokens`` (int32) is one token, the
    tokens of a stream in order; ``logprob_index`` and ``logprobs`` as in ``Tokens``. ``ends`` come after the tokens.
    ``cancelled``: (call id, request id) of cancels that are complete. ``failed``: requests that ended with an error.

    Connection 0 is nobody: what is told there is for the journal alone."""

    connection: int
    handles: I32 = field(default_factory=lambda: NO_NUMBERS)
    positions: I32 = field(default_factory=lambda: NO_NUMBERS)
    tokens: I32 = field(default_factory=lambda: NO_NUMBERS)
    logprob_index: I32 = field(default_factory=lambda: NO_NUMBERS)
    logprobs: tuple[LogprobEntry, ...] = ()
    ends: list[StreamEnd] = field(default_factory=list)
    cancelled: list[tuple[int, str]] = field(default_factory=list)
    failed: list[tuple[str, ErrorInfo]] = field(default_factory=list)


class Outbox:
    """Collects until :meth:`take`."""

    def __init__(self) -> None:
        self._emissions: list[Emission] = []
        self._ends: list[tuple[int, StreamEnd]] = []
        self._cancelled: list[tuple[int, int, str]] = []
        self._failed: list[tuple[int, str, ErrorInfo]] = []
        self._gone: set[int] = set()

    def add_tokens(self, emissions: list[Emission]) -> None:
        """Tokens for any connections, those of a stream in order."""
        self._emissions.extend(emissions)

    def add_end(self, connection: int, end: StreamEnd) -> None:
        """A sequence has ended. Its tokens may be added before or after: :meth:`take` puts ends behind them."""
        self._ends.append((connection, end))

    def add_cancelled(self, connection: int, call_id: int, request_id: str) -> None:
        """A cancel is complete: no row holds the request any more."""
        self._cancelled.append((connection, call_id, request_id))

    def add_failed(self, connection: int, request_id: str, error: ErrorInfo) -> None:
        """A request has ended with an error."""
        self._failed.append((connection, request_id, error))

    def drop(self, connection: int, kept: Sequence[int] = ()) -> None:
        """Nothing that is here now goes to that connection any more. What belongs to the stream handles ``kept`` goes
        to connection 0."""
        self._gone.add(connection)
        if not kept:
            return
        for emission in self._emissions:
            theirs = (emission.connections == connection) & np.isin(emission.streams, kept)
            emission.connections[theirs] = 0
        handles = set(kept)
        self._ends = [
            (0 if reader == connection and end.handle in handles else reader, end) for reader, end in self._ends
        ]

    def pending(self) -> tuple[dict[int, int], set[int]]:
        """What has not been taken yet: tokens by stream handle, and the handles of streams that have ended."""
        handles = [emission.streams for emission in self._emissions]
        found, counts = np.unique(np.concatenate(handles), return_counts=True) if handles else (NO_NUMBERS, NO_NUMBERS)
        tokens = dict(zip(found.tolist(), counts.tolist(), strict=True))
        return tokens, {end.handle for _, end in self._ends}

    def clear(self) -> None:
        """Forgets everything collected, and which connections were dropped."""
        self._emissions.clear()
        self._ends.clear()
        self._cancelled.clear()
        self._failed.clear()
        self._gone.clear()

    def take(self) -> list[ConnectionOutput]:
        """Everything collected, by ascending connection, and forgets it."""
        if not (self._emissions or self._ends or self._cancelled or self._failed):
            self._gone.clear()
            return []
        outputs: dict[int, ConnectionOutput] = {}
        if self._emissions:
            self._sort_tokens(outputs)
        for connection, end in self._ends:
            outputs.setdefault(connection, ConnectionOutput(connection)).ends.append(end)
        for connection, call_id, request_id in self._cancelled:
            cancelled = outputs.setdefault(connection, ConnectionOutput(connection)).cancelled
            cancelled.append((call_id, request_id))
        for connection, request_id, error in self._failed:
            outputs.setdefault(connection, ConnectionOutput(connection)).failed.append((request_id, error))
        kept = [outputs[connection] for connection in sorted(outputs) if connection not in self._gone]
        self.clear()
        return kept

    def _sort_tokens(self, outputs: dict[int, ConnectionOutput]) -> None:
        emissions = self._emissions
        one = emissions[0]
        if len(emissions) > 1:
            logprobs: dict[int, LogprobEntry] = {}
            start = 0
            for emission in emissions:
                logprobs.update({start + i: entry for i, entry in emission.logprobs.items()})
                start += len(emission.tokens)
            one = Emission(
                np.concatenate([e.connections for e in emissions]),
                np.concatenate([e.streams for e in emissions]),
                np.concatenate([e.positions for e in emissions]),
                np.concatenate([e.tokens for e in emissions]),
                logprobs,
            )
        first = int(one.connections[0])
        if (one.connections == first).all():
            outputs[first] = _output(first, one, slice(None), one.logprobs)
            return
        order = np.argsort(one.connections, kind="stable")
        where = {int(place): i for i, place in enumerate(order)} if one.logprobs else {}
        logprobs = {where[i]: entry for i, entry in one.logprobs.items()}
        one = Emission(one.connections[order], one.streams[order], one.positions[order], one.tokens[order], logprobs)
        starts = [0, *(np.flatnonzero(np.diff(one.connections)) + 1).tolist(), len(order)]
        for start, end in itertools.pairwise(starts):
            connection = int(one.connections[start])
            own = {i - start: entry for i, entry in logprobs.items() if start <= i < end}
            outputs[connection] = _output(connection, one, slice(start, end), own)


def _output(connection: int, one: Emission, span: slice, logprobs: dict[int, LogprobEntry]) -> ConnectionOutput:
    places = sorted(logprobs)
    return ConnectionOutput(
        connection,
        one.streams[span],
        one.positions[span],
        one.tokens[span],
        np.asarray(places, dtype=np.int32),
        tuple(logprobs[i] for i in places),
    )
