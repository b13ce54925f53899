"""How the control thread tells the main thread to leave an epoch that is over."""

from __future__ import annotations

from typing import Final

from drumline.protocol.errors import DrumlineError, ErrorInfo

_NEVER: Final = (-1, -1)
_ALL: Final = (1 << 62, 1 << 62)
_LAST: Final = (1 << 61, 0)


class EpochAborted(DrumlineError):
    """The epoch ended while this rank was still in it. Not a fault of this rank."""

    kind = "epoch_aborted"
    retryable = True


class AbortFlag:
    """Every epoch before a certain one is over. Set by the control thread, looked at by the main thread.

    One tuple is replaced as a whole, so neither side needs a lock.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int] = _NEVER
        self._reason = ""

    def abort_before(self, term: int, epoch: int, reason: str) -> None:
        """Epochs older than ``(term, epoch)`` are over."""
        if (term, epoch) > self._before:
            self._reason = reason
            self._before = (term, epoch)

    def abort_all(self, reason: str) -> None:
        """The process is about to end."""
        self.abort_before(*_ALL, reason)

    def check_all(self) -> None:
        """Raises EpochAborted when the process is about to end."""
        self.check(*_LAST)

    def covers(self, term: int, epoch: int) -> bool:
        """Whether the epoch is over."""
        return (term, epoch) < self._before

    def check(self, term: int, epoch: int) -> None:
        """Raises EpochAborted when the epoch is over."""
        if (term, epoch) < self._before:
            text = f"epoch ({term}, {epoch}) is over: {self._reason}"
            raise EpochAborted(text, ErrorInfo(kind="epoch_aborted", text=text, retryable=True, epoch=epoch))
