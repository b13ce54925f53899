"""What goes to clients about requests leaves in the order it was made, and once the journal holds what came before."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from drumline.engine.journal.batches import Batch
from drumline.engine.journal.journal import Journal

log = logging.getLogger(__name__)


class _Waiting:
    """A send that waits. ``kept``: whether its own batch is in the journal."""

    __slots__ = ("kept", "send", "since")

    def __init__(self, send: Callable[[], None], since: float, kept: bool) -> None:
        self.send = send
        self.since = since
        self.kept = kept


class Delivery:
    """First in, first out, in one loop. ``journal`` None: everything is sent at once."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._waiting: deque[_Waiting] = deque()
        self._sending = False
        self._queued = 0
        self._committed = 0
        self._longest_s = 0.0
        self._total_s = 0.0

    def push(self, batch: Batch | None, send: Callable[[], None]) -> None:
        """Call ``send`` once ``batch`` and all before it are in the journal; at once where nothing is to be waited for.
        A send that raises is logged and holds up nothing."""
        journal = self._journal
        if journal is None or batch is None or batch.empty:
            if journal is not None and journal.superseded:
                return
            self._waiting.append(_Waiting(send, 0.0, kept=True))
            self._drain()
            return
        waiting = _Waiting(send, time.perf_counter(), kept=False)
        self._waiting.append(waiting)
        self._queued += 1
        journal.append(batch, lambda: self._kept(waiting))

    def _kept(self, waiting: _Waiting) -> None:
        took = time.perf_counter() - waiting.since
        self._committed += 1
        self._total_s += took
        self._longest_s = max(self._longest_s, took)
        waiting.kept = True
        self._drain()

    def _drain(self) -> None:
        """Send what may be sent. A send that pushes finds its own place behind those that wait."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._waiting and self._waiting[0].kept:
                send = self._waiting.popleft().send
                try:
                    send()
                except Exception:
                    log.exception("something could not be sent to a client")
        finally:
            self._sending = False

    def counters(self) -> dict[str, int]:
        """``batches_queued`` and ``batches_committed`` (also given up while degraded), and how long one took, in
        microseconds: ``commit_us_max``, ``commit_us_mean``."""
        mean = self._total_s / self._committed if self._committed else 0.0
        return {
            "batches_queued": self._queued,
            "batches_committed": self._committed,
            "commit_us_max": round(self._longest_s * 1e6),
            "commit_us_mean": round(mean * 1e6),
        }

    def close(self) -> None:
        """After the journal was closed: nothing may wait any more. Once another coordinator has the file, what still
        does is not sent."""
        if self._journal is not None and self._journal.superseded:
            self._waiting.clear()
        for waiting in self._waiting:
            waiting.kept = True
        self._drain()
