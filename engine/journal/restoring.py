"""From the rows of a journal to the requests that they tell of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.rows import Columns, join_columns
from drumline.protocol.messages import I32, NO_NUMBERS, LogprobEntry, StreamEnd, Submit


class Spans:
    """Which stream handles belong to which sequences. A sequence's number is its request's place in ``requests`` and
    its index, counted through: the first request's are 0 to n - 1.

    ``requests``: (submit, first handle); ``rehandled``: (first handle, the first handle of the request before).
    """

    def __init__(self, requests: Sequence[tuple[Submit, int]], rehandled: Sequence[tuple[int, int]] = ()) -> None:
        self.first_sequence: list[int] = []
        self.sequences = 0
        known: dict[int, tuple[int, int]] = {}
        for submit, first in requests:
            known[first] = (self.sequences, submit.n)
            self.first_sequence.append(self.sequences)
            self.sequences += submit.n
        spans = [(first, *where) for first, where in known.items()]
        spans += [(first, *known[request]) for first, request in rehandled if request in known]
        spans.sort()
        table = np.asarray(spans, dtype=np.int64).reshape(-1, 3)
        self._firsts, self._starts, self._counts = table[:, 0], table[:, 1], table[:, 2]

    def of(self, handles: I32) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """int64, the number of each handle's sequence, -1 where it belongs to none."""
        if not len(self._firsts):
            return np.full(len(handles), -1, dtype=np.int64)
        at = np.searchsorted(self._firsts, handles, side="right") - 1
        offset = handles - self._firsts[at]
        inside = (at >= 0) & (offset < self._counts[at])
        return np.where(inside, self._starts[at] + offset, -1)


def restore(
    requests: Sequence[tuple[Submit, int]], rehandled: Sequence[tuple[int, int]], steps: Sequence[Columns]
) -> tuple[RestoredRequest, ...]:
    """The requests, in order of their handles, with their tokens, logprobs and ends.

    What ``steps`` say of other requests is left out. A position told twice counts as told last; tokens behind a gap,
    and an end whose tokens are not all there, are left out: what is given back is always the beginning of what was
    written.
    """
    requests = sorted(requests, key=lambda one: one[1])
    spans = Spans(requests, rehandled)
    newest = {first: first for _, first in requests}
    for first, request in rehandled:
        newest[request] = max(newest.get(request, -1), first)
    streams = _Streams(spans, join_columns(list(steps)) if steps else Columns())
    restored: list[RestoredRequest] = []
    for (submit, first), number in zip(requests, spans.first_sequence, strict=True):
        handle = newest[first]
        sequences = [streams.sequence(number + index, handle + index) for index in range(submit.n)]
        tokens, logprobs, ends = zip(*sequences, strict=True)
        restored.append(RestoredRequest(submit, handle, tokens, logprobs, ends))
    return tuple(restored)


class _Streams:
    """Tokens sorted by sequence and position."""

    def __init__(self, spans: Spans, told: Columns) -> None:
        sequences = spans.of(told.handles)
        order = np.lexsort((told.positions, sequences))
        order = order[sequences[order] >= 0]
        # Of equal places the last: lexsort keeps the order in which they were told.
        places: Any = np.stack((sequences[order], told.positions[order]))
        if len(order):
            last = np.append((np.diff(places) != 0).any(axis=0), True)
            order, places = order[last], places[:, last]
        self._positions = places[1]
        self._tokens = told.tokens[order]
        self._bounds = np.searchsorted(places[0], np.arange(spans.sequences + 1))
        entry_of = np.full(len(told.tokens), -1, dtype=np.int64)
        entry_of[told.logprob_index] = np.arange(len(told.logprob_index))
        self._entry_of = entry_of[order]
        self._entries = told.logprobs
        handles = np.asarray([end.handle for end in told.ends], dtype=np.int32)
        self._ends = {int(n): end for n, end in zip(spans.of(handles), told.ends, strict=True) if n >= 0}

    def sequence(self, number: int, handle: int) -> tuple[I32, tuple[LogprobEntry, ...], StreamEnd | None]:
        start, stop = int(self._bounds[number]), int(self._bounds[number + 1])
        positions = self._positions[start:stop]
        gaps = np.flatnonzero(positions != np.arange(stop - start))
        count = int(gaps[0]) if len(gaps) else stop - start
        end = self._ends.get(number)
        if end is not None:
            if end.num_tokens > count:
                end = None
            else:
                count = end.num_tokens
                end = msgspec.structs.replace(end, handle=handle)
        if not count:
            return NO_NUMBERS, (), end
        entries = self._entry_of[start : start + count]
        logprobs = tuple(self._entries[i] for i in entries[entries >= 0].tolist())
        return self._tokens[start : start + count].copy(), logprobs, end
