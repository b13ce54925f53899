"""Messages between two ranks that have been started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TypeVar

from torch import Tensor

from drumline.workers.groups.watch import SLICE_S, Watch

MAX_UNFINISHED_SENDS = 64


class Pending(ABC):
    """A message under way; what carries it says how to :meth:`look` for its end."""

    def __init__(self, watch: Watch, peer: int) -> None:
        self._watch = watch
        self._peer = peer

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the message is through, or has failed."""

    @abstractmethod
    def look(self, slice_s: float) -> bool:
        """Whether the message is through within ``slice_s``. Raises PeerLost when it has failed."""

    def _finish(self) -> None:
        waited = 0.0
        while not self.look(SLICE_S):
            self._watch.check()
            waited += SLICE_S
            self._watch.check_deadline(waited, [self._peer])


class PendingSend(Pending):
    """A message that is being sent. Its tensor must not be written to before :meth:`wait` has returned."""

    def wait(self) -> None:
        """Return when the tensor may be used again. Errors: EpochAborted, PeerLost, GroupTimeout."""
        with self._watch:
            self._finish()


class PendingRecv(Pending):
    """A message that is expected."""

    result: Tensor

    def wait(self) -> Tensor:
        """The tensor, when it is there. Errors: EpochAborted, PeerLost, GroupTimeout."""
        with self._watch:
            self._finish()
        return self.result


S = TypeVar("S", bound=PendingSend)


def has_room(sends: deque[S]) -> bool:
    """Whether :func:`make_room` waits for nothing. Errors: those of sends that have failed."""
    while sends and sends[0].done:
        sends.popleft().wait()
    return len(sends) < MAX_UNFINISHED_SENDS


def make_room(sends: deque[S]) -> None:
    """Wait for the oldest send while ``MAX_UNFINISHED_SENDS`` are unfinished. Errors: those of its wait."""
    while sends and (sends[0].done or len(sends) >= MAX_UNFINISHED_SENDS):
        sends.popleft().wait()
