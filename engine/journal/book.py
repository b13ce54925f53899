"""A journal's file over its whole life in one process: opened, written to, kept small, replaced when it is damaged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.batches import Batch
from drumline.engine.journal.compaction import DEAD_BYTES, Compaction
from drumline.engine.journal.errors import Damaged, JournalTrouble, Unwritable
from drumline.engine.journal.mark import Mark
from drumline.engine.journal.opening import Opened, open_store
from drumline.engine.journal.store import Store
from drumline.protocol.errors import InvalidConfig

LOOK_S = 1.0
"""How often it is made sure that the path still leads to the file, while it is written to."""


class Book:
    """Used by one thread. ``whole``: whether what was found at the start is all that an earlier coordinator told."""

    def __init__(self, path: str, term: int, dead_bytes: int = DEAD_BYTES) -> None:
        self.mark = Mark(path + ".whole")
        self.whole = False
        self._path = path
        self._term = term
        self._dead_bytes = dead_bytes
        self._store: Store | None = None
        self._compaction: Compaction | None = None
        self._full = False
        self._look_at = 0.0

    def open(self) -> Opened:
        """Take the file over, or what is left of it. Raises InvalidConfig, Superseded."""
        opened = open_store(self._path, self._term)
        self._use(opened.store)
        if opened.store is None:
            self.whole = False
        elif opened.seq >= 0:
            self.whole = self.mark.covers(opened.seq)
        else:
            self.whole = self._term == 1 and not opened.aside
        with contextlib.suppress(OSError):
            if self.whole and opened.store is not None:
                self.mark.create(opened.store.seq)
            else:
                self.mark.remove()
        return opened

    def _use(self, store: Store | None) -> None:
        self._store = store
        self._compaction = None if store is None else Compaction(store, self._dead_bytes)
        if store is not None and self._full:
            store.limit(True)

    def commit(self, batches: Sequence[Batch]) -> None:
        """Write ``batches`` down. Raises a JournalTrouble; after any but Locked only :meth:`probe` and
        :meth:`replace` help."""
        store = self._ready()
        try:
            store.commit(batches)
            self.mark.record(store.seq)
        except Damaged:
            self._let_go()
            raise
        except OSError as error:
            raise Unwritable(str(error)) from error

    def replace(self, snapshot: Sequence[RestoredRequest]) -> None:
        """Write ``snapshot`` down in place of all that is there."""
        self._ready().replace(snapshot)

    def complete(self) -> None:
        """Everything told is in the file. Raises Unwritable."""
        try:
            if self.whole:
                self.mark.create(self._ready().seq)
        except OSError as error:
            raise Unwritable(str(error)) from error

    def limit(self, full: bool) -> None:
        """Find the disk full from now on, or no longer."""
        self._full = full
        if self._store is not None:
            self._store.limit(full)

    def probe(self, nbytes: int) -> str:
        """Make sure that so many bytes can be written, with a new file where the old one cannot be. Returns what has
        become of that one, empty when nothing has. Raises a JournalTrouble."""
        aside = ""
        if self._store is not None and not self._store.in_place():
            self._let_go()
        if self._store is None:
            aside = self._open_again()
        try:
            self._ready().probe(nbytes)
        except Damaged:
            # The next one begins a new file.
            self._let_go()
            raise
        return aside

    def _open_again(self) -> str:
        try:
            opened = open_store(self._path, self._term, again=True)
        except InvalidConfig as error:
            raise Unwritable(str(error)) from error
        self._use(opened.store)
        if opened.store is None:
            raise Unwritable(opened.reason)
        return opened.aside

    @property
    def busy(self) -> bool:
        """Whether :meth:`maintain` has something to do now."""
        return self._compaction is not None and self._store is not None and self._store.usable and self._compaction.due

    def maintain(self) -> None:
        """A piece of what keeps the file small. Raises a JournalTrouble."""
        store, compaction = self._store, self._compaction
        if store is None or compaction is None or not store.usable:
            return
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            if not store.in_place():
                self._let_go()
                raise Unwritable(f"{self._path} is gone, or another file is there")
        if compaction.due:
            compaction.work()

    def _ready(self) -> Store:
        if self._store is None:
            raise Unwritable("it is not open")
        return self._store

    def _let_go(self) -> None:
        store, self._store, self._compaction = self._store, None, None
        if store is not None:
            store.close()

    def close(self, checkpoint: bool) -> None:
        """Close the file, with its log moved into it if ``checkpoint``."""
        if self._store is not None and checkpoint:
            with contextlib.suppress(JournalTrouble):
                self._store.checkpoint()
        self._let_go()
        self.mark.close()
