"""Keeping a journal small: tokens of requests that are over are left out, rows of others put together."""

from __future__ import annotations

import numpy as np

from drumline.engine.journal.restoring import Spans
from drumline.engine.journal.rows import Columns, StepRow, join_columns, read_step
from drumline.engine.journal.store import WAL_BYTES, Store

DEAD_BYTES = 4 << 20
CHUNK_BYTES = 256 << 10
"""How much a transaction of compaction reads: batches wait for no more than that."""
PAGES = 128
"""How many free pages are given back at once."""


class Compaction:
    """Small pieces of work on ``store``, one a call, whenever nothing waits to be committed.

    A round begins when more was appended since the last one than that left over, and than ``dead_bytes``: so the file
    holds at most about twice what is needed, and that many bytes.
    """

    def __init__(self, store: Store, dead_bytes: int = DEAD_BYTES) -> None:
        self._store = store
        self._dead_bytes = dead_bytes
        self._left = 0
        self._after = -1
        self._last = -1
        self._written = 0
        self._vacuuming = False
        self.rounds = 0

    @property
    def due(self) -> bool:
        """Whether there is something to do."""
        store = self._store
        running = self._last >= 0 or self._vacuuming
        return running or store.appended > max(self._left, self._dead_bytes) or store.wal_bytes() > WAL_BYTES

    def work(self) -> None:
        """Do a piece of it. Raises what :meth:`Store.transaction` does."""
        store = self._store
        if self._last >= 0:
            self._compact()
        elif self._vacuuming:
            self._vacuuming = store.vacuum(PAGES)
            if not self._vacuuming:
                store.checkpoint()
        elif store.appended > max(self._left, self._dead_bytes):
            self._after, self._last, self._written = -1, store.seq, 0
            store.appended = 0
        else:
            store.checkpoint()

    def _compact(self) -> None:
        store = self._store
        with store.transaction() as connection:
            rows = store.read_steps(connection, self._after, self._last, CHUNK_BYTES)
            if rows:
                self._after = rows[-1].seq
                self._written += store.put_in_place(connection, rows, self._living(rows))
        if not rows or self._after >= self._last:
            self._left, self._last = self._written, -1
            self._vacuuming = True
            self.rounds += 1

    def _living(self, rows: list[StepRow]) -> Columns | None:
        live = self._store.live.values()
        requests = [(one.submit, one.row.first) for one in live]
        spans = Spans(requests, [(row.first, row.request) for one in live for row in one.rehandled])
        joined = join_columns([read_step(row) for row in rows])
        keep = spans.of(joined.handles) >= 0
        ending = spans.of(np.asarray([end.handle for end in joined.ends], dtype=np.int32))
        ends = tuple(end for end, sequence in zip(joined.ends, ending.tolist(), strict=True) if sequence >= 0)
        if not keep.any() and not ends:
            return None
        place = np.cumsum(keep, dtype=np.int32) - 1
        entries = np.flatnonzero(keep[joined.logprob_index])
        return Columns(
            joined.handles[keep],
            joined.positions[keep],
            joined.tokens[keep],
            place[joined.logprob_index[entries]].astype(np.int32),
            tuple(joined.logprobs[i] for i in entries.tolist()),
            ends,
        )
