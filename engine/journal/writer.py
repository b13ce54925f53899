"""The thread that writes a journal down. It alone touches the file."""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.batches import LOGPROB_BYTES, REQUEST_BYTES
from drumline.engine.journal.book import Book
from drumline.engine.journal.errors import JournalTrouble, Locked, Superseded
from drumline.engine.journal.opening import Opened
from drumline.engine.journal.orders import Append, Close, Complete, Limit, Order, Probe, Recover, Reports

log = logging.getLogger(__name__)

BATCHES_AT_ONCE = 256
ROUNDS_BETWEEN = 16
"""How many commits may follow each other before the file is looked after."""
PROBE_S = 0.25
LONGEST_PROBE_S = 5.0
PROBE_BYTES = 64 << 10
ANSWER_S = 5.0
"""How long a snapshot may take to be given before it is asked for again."""
WHOLE_AFTER_S = 600.0
"""A coordinator that began without some requests has been told of them by then, or they are over."""


class Writer:
    """Takes orders from another thread through :meth:`put`; they are carried out one after the other.

    ``generation`` is raised by the owner whenever what was appended before is given up. ``lock`` is held while the mark
    is set or taken away; the owner waits for it, unless the disk hangs.
    ``committed_number``: the number of the last batch that is in the file. ``is_superseded``: it belongs to another.
    """

    def __init__(self, book: Book, reports: Reports, whole_after_s: float = WHOLE_AFTER_S) -> None:
        self.lock = threading.Lock()
        self.generation = 0
        self.committed_number = 0
        self.is_superseded = False
        self.opened: Future[Opened] = Future()
        self.thread = threading.Thread(target=self._run, name="drumline-journal", daemon=True)
        self._book = book
        self._reports = reports
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._heal_at = time.monotonic() + whole_after_s
        # The generation in which all that was told is in the file, and that in which it is tried to be written to.
        self._settled = -1
        self._probing = -1
        self._probe_at = 0.0
        self._probe_s = PROBE_S
        self._probe_bytes = PROBE_BYTES
        self._rounds = 0

    def put(self, order: Order) -> None:
        """Have an order carried out."""
        self._orders.put(order)

    def _run(self) -> None:
        book = self._book
        try:
            opened = book.open()
        except BaseException as error:
            book.close(checkpoint=False)
            self.opened.set_exception(error)
            return
        if opened.store is not None:
            self._settled = 0
        self.opened.set_result(opened)
        try:
            while self._round():
                pass
        finally:
            book.close(checkpoint=not self.is_superseded)

    def _round(self) -> bool:
        """Wait for orders and carry out some. Returns whether to go on."""
        order = self._next(self._patience())
        appends: list[Append] = []
        while isinstance(order, Append) and len(appends) < BATCHES_AT_ONCE:
            appends.append(order)
            order = None if self._orders.empty() else self._orders.get()
        self._commit(appends)
        if isinstance(order, Append):
            self._commit([order])
        elif isinstance(order, Close):
            return False
        elif order is not None:
            self._obey(order)
        self._rounds += 1
        if self._orders.empty() or self._rounds >= ROUNDS_BETWEEN:
            self._rounds = 0
            self._look_after()
        return True

    def _next(self, timeout: float | None) -> Order | None:
        try:
            return self._orders.get(timeout=timeout)
        except queue.Empty:
            return None

    def _patience(self) -> float | None:
        """How long the next order may be waited for, in seconds."""
        if self.is_superseded:
            return None
        now = time.monotonic()
        if self._probing == self.generation:
            return max(self._probe_at - now, 0.0)
        if self._book.busy:
            return 0.0
        return None if self._book.whole else max(self._heal_at - now, 0.0)

    # ---------------------------------------------------------------------------------------------------------- orders

    def _commit(self, appends: list[Append]) -> None:
        appends = [one for one in appends if one.generation == self.generation]
        if not appends:
            return
        generation, number = appends[-1].generation, appends[-1].number
        batches = [one.batch for one in appends]
        while generation == self.generation and not self.is_superseded:
            try:
                self._book.commit(batches)
            except Locked:
                # SQLite has waited, where that helps; the owner's patience ends the generation.
                time.sleep(0.01)
                continue
            except Exception as error:
                self._failed(generation, error)
                return
            self.committed_number = number
            self._reports.committed()
            return

    def _obey(self, order: Order) -> None:
        if isinstance(order, Limit):
            self._book.limit(order.full)
        elif isinstance(order, Probe) and order.generation == self.generation:
            self._probing = order.generation
            self._probe_at = time.monotonic() + self._probe_s
        elif isinstance(order, Recover) and order.generation == self.generation and not self.is_superseded:
            self._recover(order)
        elif isinstance(order, Complete) and not self.is_superseded:
            self._complete(order)

    def _recover(self, order: Recover) -> None:
        try:
            self._book.replace(order.snapshot)
        except Exception as error:
            # The next one comes later, and only when there is room for all of it.
            self._probe_s = min(2 * self._probe_s, LONGEST_PROBE_S)
            self._probe_bytes = max(PROBE_BYTES, _nbytes(order.snapshot))
            self._failed(order.generation, error)
            return
        self._reports.recovered(order.generation)

    def _complete(self, order: Complete) -> None:
        try:
            with self.lock:
                if order.generation != self.generation:
                    return
                self._book.complete()
                self._settled = order.generation
        except Exception as error:
            self._failed(order.generation, error)
            return
        self._probe_s, self._probe_bytes = PROBE_S, PROBE_BYTES
        self._reports.completed(order.generation)

    def _failed(self, generation: int, error: Exception) -> None:
        if isinstance(error, Superseded):
            self.is_superseded = True
            self._reports.superseded(str(error))
            return
        if not isinstance(error, JournalTrouble):
            log.error("the journal's thread met an error that it does not know", exc_info=error)
        self._reports.failed(generation, str(error) or repr(error))

    # ----------------------------------------------------------------------------------------------- between the orders

    def _look_after(self) -> None:
        if self.is_superseded:
            return
        generation = self.generation
        if self._probing == generation:
            if time.monotonic() >= self._probe_at:
                self._probe(generation)
        elif self._settled == generation:
            try:
                self._heal(generation)
                self._book.maintain()
            except Locked:
                # Nothing has changed; later, then.
                return
            except Exception as error:
                self._failed(generation, error)

    def _probe(self, generation: int) -> None:
        self._probe_at = time.monotonic() + self._probe_s
        try:
            aside = self._book.probe(self._probe_bytes)
        except Superseded as error:
            self._failed(generation, error)
            return
        except JournalTrouble:
            # As before: that it cannot be written to has been told.
            return
        except Exception:
            log.exception("the journal's thread met an error that it does not know")
            return
        if aside:
            self._reports.set_aside(aside)
        self._probe_at = time.monotonic() + ANSWER_S
        self._reports.writable(generation)

    def _heal(self, generation: int) -> None:
        if self._book.whole or time.monotonic() < self._heal_at:
            return
        with self.lock:
            if generation == self.generation:
                self._book.whole = True
                self._book.complete()


def _nbytes(snapshot: tuple[RestoredRequest, ...]) -> int:
    """About how many bytes a snapshot takes in the file."""
    size = 0
    for request in snapshot:
        size += REQUEST_BYTES + request.submit.prompt.nbytes + 3 * sum(tokens.nbytes for tokens in request.tokens)
        size += LOGPROB_BYTES * sum(len(entries) for entries in request.logprobs)
    return size
