"""What the main thread is to do, in order: the coordinator's messages, and what the control thread has to say."""

from __future__ import annotations

import queue
from typing import NamedTuple, TypeAlias

from drumline.protocol.messages import (
    Call,
    CancelStage,
    Configure,
    Injection,
    Leave,
    Load,
    OpenStore,
    Shutdown,
    StageExperts,
    Step,
    ToWorker,
)
from drumline.workers.abort import AbortFlag

INBOX_LIMIT = 32
"""The steps in flight (pipeline stages and one), an order to stage experts, one to give that up and eight control calls
fit, for up to 20 stages."""


class CoordinatorLost(NamedTuple):
    """There is no coordinator: what there was of an epoch is over."""

    text: str


class Trigger(NamedTuple):
    """An injected fault that the main thread is to bring about where it stands."""

    injection: Injection


_OF_EPOCH = (Leave, OpenStore, Configure, Step, Call, StageExperts, CancelStage)

Order: TypeAlias = ToWorker | CoordinatorLost | Trigger


class Inbox:
    """The control thread puts, the main thread gets."""

    def __init__(self, abort: AbortFlag) -> None:
        self.abort = abort
        self.stale = 0
        # SimpleQueue is one lock in C; its bound is kept by the only thread that puts.
        self._queue: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def __len__(self) -> int:
        return self._queue.qsize()

    def get(self, timeout_s: float | None = None) -> Order | None:
        """The next order; waits for it, at most ``timeout_s`` where that is given, and is None when none has come. What
        belongs to an epoch that is over is passed by and counted."""
        while True:
            try:
                order = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                return None
            if not isinstance(order, _OF_EPOCH) or not self.abort.covers(order.term, order.epoch):
                return order
            self.stale += 1

    def put(self, order: Order) -> bool:
        """Whether there was room."""
        if self._queue.qsize() >= INBOX_LIMIT and not isinstance(order, Shutdown | CoordinatorLost | Trigger):
            return False
        self._queue.put(order)
        return True

    def drop(self) -> list[Load]:
        """Forget everything: it came from a coordinator that is gone. Returns what was to be loaded."""
        loads: list[Load] = []
        while True:
            try:
                order = self._queue.get_nowait()
            except queue.Empty:
                return loads
            self.stale += 1
            if isinstance(order, Load):
                loads.append(order)
