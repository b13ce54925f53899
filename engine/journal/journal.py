"""The journal as the coordinator's loop sees it: it takes batches, says when they are in the file, and never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NamedTuple, ParamSpec

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.batches import Batch
from drumline.engine.journal.book import Book
from drumline.engine.journal.compaction import DEAD_BYTES
from drumline.engine.journal.errors import Superseded
from drumline.engine.journal.orders import Append, Close, Complete, Limit, Probe, Recover, Reports
from drumline.engine.journal.writer import WHOLE_AFTER_S, Writer
from drumline.protocol.errors import EngineClosed, InvalidConfig

log = logging.getLogger(__name__)
P = ParamSpec("P")

MAX_BATCHES = 4096
MAX_BYTES = 64 << 20
WATCH_S = 0.2
PATIENCE = 5
"""A batch that has waited for so many looks, 1.0 s, is given up."""
UNMARK_S = 0.5
LOCK_S = 0.2
"""How long the loop waits for the thread to be through with the mark."""
OPEN_S = 120.0
CLOSE_S = 2.0


class _Mode(enum.Enum):
    ON = "on"
    #: Nothing is kept.
    DEGRADED = "degraded"
    #: A snapshot is being written. What comes after it is kept, and nothing waits for that.
    RECOVERING = "recovering"
    #: The snapshot is in the file, what came after it not yet. What comes now waits.
    CATCHING_UP = "catching up"
    SUPERSEDED = "superseded"
    CLOSED = "closed"


class _Waiting(NamedTuple):
    """A batch that has been handed to the thread. ``on_committed`` is None when nothing waits for it."""

    number: int
    nbytes: int
    on_committed: Callable[[], None] | None


class Journal:
    """Made by :meth:`open`. All methods are called in the loop that it was opened in.

    ``whole``: whether what was found at the start is all that earlier coordinators told.
    """

    def __init__(
        self,
        book: Book,
        on_state: Callable[[str, str], None],
        on_superseded: Callable[[str], None],
        whole_after_s: float = WHOLE_AFTER_S,
    ) -> None:
        self.whole = False
        self._loop = asyncio.get_running_loop()
        self._on_state = on_state
        self._on_superseded = on_superseded
        self._book = book
        self._writer = Writer(
            book,
            Reports(
                committed=self._in_loop(self._committed),
                failed=self._in_loop(self._failed),
                writable=self._in_loop(self._writable),
                recovered=self._in_loop(self._recovered),
                completed=self._in_loop(self._completed),
                superseded=self._in_loop(self._lost),
                set_aside=self._in_loop(self._replaced),
            ),
            whole_after_s,
        )
        self._mode = _Mode.ON
        self._number = 0
        self._waiting: deque[_Waiting] = deque()
        self._nbytes = 0
        # While the mark is being taken away, what was given up waits for that.
        self._releasing = False
        self._watch: asyncio.TimerHandle | None = None
        self._watched = 0
        self._looks = 0

    def _in_loop(self, told: Callable[P, None]) -> Callable[P, None]:
        def tell(*arguments: P.args, **named: P.kwargs) -> None:
            # The loop may have ended: nobody waits then.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(functools.partial(told, *arguments, **named))

        return tell

    @classmethod
    def open(
        cls,
        path: str,
        term: int,
        *,
        on_state: Callable[[str, str], None],
        on_superseded: Callable[[str], None],
        dead_bytes: int = DEAD_BYTES,
        whole_after_s: float = WHOLE_AFTER_S,
    ) -> tuple[Journal, tuple[RestoredRequest, ...]]:
        """The journal in the file at ``path``, from now on that of ``term``, and the requests in it. Made if it does
        not exist; a damaged one is renamed, and an empty one begun.

        ``on_state(state, text)`` is called in the loop, never before this returns: with "degraded" when nothing can be
        kept any more, "writable" when :meth:`recover` is to be called with a snapshot, "on" once that is kept, and "set
        aside" when a damaged file was renamed. ``on_superseded(text)``: another coordinator has the file.

        Raises InvalidConfig for a path that cannot be a journal's, EngineClosed for one that belongs to the same or a
        higher term.
        """
        journal = cls(Book(path, term, dead_bytes), on_state, on_superseded, whole_after_s)
        return journal, journal._start(path)

    def _start(self, path: str) -> tuple[RestoredRequest, ...]:
        self._writer.thread.start()
        try:
            opened = self._writer.opened.result(OPEN_S)
        except Superseded as error:
            raise EngineClosed(f"the journal {path} cannot be used: {error}") from error
        except FutureTimeoutError:
            self._writer.put(Close())
            raise InvalidConfig("journal", path, f"a file that can be read within {OPEN_S:g} s") from None
        self.whole = self._book.whole
        if opened.aside:
            self._loop.call_soon(self._on_state, "set aside", opened.aside)
        if opened.store is None:
            self._give_up(mark=False)
            self._loop.call_soon(self._on_state, "degraded", f"{path}: {opened.reason}")
        return opened.requests

    # --------------------------------------------------------------------------------------------------------- batches

    @property
    def state(self) -> str:
        """on or degraded."""
        return "on" if self._mode is _Mode.ON else "degraded"

    @property
    def superseded(self) -> bool:
        """Whether another coordinator has the file: nothing may be told any more."""
        return self._mode is _Mode.SUPERSEDED

    def append(self, batch: Batch, on_committed: Callable[[], None]) -> None:
        """Have ``batch`` written down. ``on_committed`` is called in the loop once it is, in the order of the calls; at
        once (or after those before) while the journal is degraded; never once another coordinator has the file."""
        mode = self._mode
        if mode is _Mode.DEGRADED:
            if self._releasing:
                self._waiting.append(_Waiting(0, 0, on_committed))
            else:
                on_committed()
            return
        if mode in (_Mode.SUPERSEDED, _Mode.CLOSED):
            return
        self._number += 1
        nbytes = batch.nbytes
        self._nbytes += nbytes
        self._waiting.append(_Waiting(self._number, nbytes, None if mode is _Mode.RECOVERING else on_committed))
        self._writer.put(Append(self._writer.generation, self._number, batch))
        if len(self._waiting) > MAX_BATCHES or self._nbytes > MAX_BYTES:
            self._degrade(f"{len(self._waiting)} batches of {self._nbytes} bytes wait to be committed")
        elif mode is not _Mode.RECOVERING and self._watch is None:
            self._looks = 0
            self._watch = self._loop.call_later(WATCH_S, self._look)
        if mode is _Mode.RECOVERING:
            on_committed()

    def _look(self) -> None:
        """Counted looks, not a clock: time in which this process did not run is not the file's fault."""
        self._watch = None
        if not self._waiting or self._mode not in (_Mode.ON, _Mode.CATCHING_UP):
            return
        first = self._waiting[0].number
        self._looks = self._looks + 1 if first == self._watched else 1
        self._watched = first
        if self._looks > PATIENCE:
            self._degrade(f"nothing was committed for {WATCH_S * PATIENCE:g} s")
            return
        self._watch = self._loop.call_later(WATCH_S, self._look)

    def _committed(self) -> None:
        number = self._writer.committed_number
        waiting = self._waiting
        while waiting and waiting[0].number <= number and not self._releasing:
            one = waiting.popleft()
            self._nbytes -= one.nbytes
            _call(one.on_committed)

    # ------------------------------------------------------------------------------------------------ degraded and back

    def _failed(self, generation: int, text: str) -> None:
        if generation == self._writer.generation:
            self._degrade(text)

    def _degrade(self, text: str) -> None:
        if self._mode in (_Mode.DEGRADED, _Mode.SUPERSEDED, _Mode.CLOSED):
            return
        was_on = self._mode is _Mode.ON
        # The thread may have set the mark already when it is only about to tell that it has caught up.
        self._give_up(mark=self._mode is not _Mode.RECOVERING)
        if was_on:
            self._on_state("degraded", text)

    def _give_up(self, mark: bool) -> None:
        """Nothing is kept from now on. ``mark``: the file still says that it tells all."""
        self._mode = _Mode.DEGRADED
        generation = self._next_generation()
        self._nbytes = 0
        self._writer.put(Probe(generation))
        self._releasing = True
        if not mark:
            self._release(generation)
            return
        # A disk that hangs must not hang this loop: what was given up is told when the mark is gone, or soon anyway.
        threading.Thread(target=self._unmark, args=(generation,), name="drumline-journal-mark", daemon=True).start()
        self._loop.call_later(UNMARK_S, self._release, generation)

    def _next_generation(self) -> int:
        """Give up what was appended before. Who has the lock for longer is held up by a disk that hangs, which must not
        hang this loop; a mark that it sets then is taken away by :meth:`_unmark`, which waits for it."""
        writer = self._writer
        held = writer.lock.acquire(timeout=LOCK_S)
        writer.generation += 1
        if held:
            writer.lock.release()
        return writer.generation

    def _unmark(self, generation: int) -> None:
        try:
            with self._writer.lock:
                self._book.mark.remove()
        except OSError as error:
            log.warning("the mark of the journal cannot be removed: %s", error)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._release, generation)

    def _release(self, generation: int) -> None:
        if generation != self._writer.generation or not self._releasing:
            return
        waiting = self._waiting
        while waiting:
            _call(waiting.popleft().on_committed)
        self._releasing = False

    def _writable(self, generation: int) -> None:
        if generation == self._writer.generation and self._mode is _Mode.DEGRADED and not self._releasing:
            self._on_state("writable", "the journal can be written to again")

    def recover(self, snapshot: tuple[RestoredRequest, ...]) -> None:
        """Write ``snapshot``, all requests with everything told of them, in place of all that is in the file. Told as
        "on" once that and what is appended meanwhile is kept. Only while the journal is degraded."""
        if self._mode is not _Mode.DEGRADED or self._releasing:
            return
        self._mode = _Mode.RECOVERING
        self._writer.put(Recover(self._next_generation(), snapshot))

    def _recovered(self, generation: int) -> None:
        if generation == self._writer.generation and self._mode is _Mode.RECOVERING:
            self._mode = _Mode.CATCHING_UP
            self._writer.put(Complete(generation))

    def _completed(self, generation: int) -> None:
        if generation == self._writer.generation and self._mode is _Mode.CATCHING_UP:
            self._mode = _Mode.ON
            self._on_state("on", "everything is kept again")

    def _replaced(self, text: str) -> None:
        self._on_state("set aside", text)

    def _lost(self, text: str) -> None:
        if self._mode not in (_Mode.SUPERSEDED, _Mode.CLOSED):
            self._mode = _Mode.SUPERSEDED
            self._waiting.clear()
            self._on_superseded(text)

    # ------------------------------------------------------------------------------------------------------------ ends

    def limit(self, full: bool) -> None:
        """Find the disk full from now on (SQLite's own limit of pages), or no longer."""
        self._writer.put(Limit(full))

    def close(self) -> None:
        """Commit what waits, within ``CLOSE_S`` seconds, and let go of the file. What waited is told: all of it, unless
        another coordinator has the file."""
        if self._mode is _Mode.CLOSED:
            return
        writer = self._writer
        if self._watch is not None:
            self._watch.cancel()
        writer.put(Close())
        writer.thread.join(CLOSE_S)
        if writer.is_superseded:
            self._mode = _Mode.SUPERSEDED
            self._waiting.clear()
            return
        self._committed()
        self._next_generation()
        if self._waiting and self._mode is _Mode.ON:
            with contextlib.suppress(OSError):
                self._book.mark.remove()
        self._mode = _Mode.CLOSED
        while self._waiting:
            _call(self._waiting.popleft().on_committed)


def _call(on_committed: Callable[[], None] | None) -> None:
    """One that raises takes nothing from those after it."""
    if on_committed is None:
        return
    try:
        on_committed()
    except Exception:
        log.exception("something that waited for the journal failed")
