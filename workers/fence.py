"""Which messages of the coordinator still count.

``(term, epoch)`` is ordered as a pair. What is older than the epoch in force is dropped and counted; within an epoch
steps come in order, without a gap.
"""

from __future__ import annotations

from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import Step


class Fence:
    """The order of one rank's epochs and steps. Not thread-safe: the main thread's own."""

    def __init__(self) -> None:
        self.term = -1
        self.epoch = -1
        self.wave = -1
        self.next_step = 0
        self.broken = False
        self.stale = 0
        self._awaited = False

    def leave(self, term: int, epoch: int) -> bool:
        """Every epoch before this one is over, and this one is still to be configured. False, and counted, when it is
        not newer than the one in force."""
        if (term, epoch) <= (self.term, self.epoch):
            self.stale += 1
            return False
        self.enter(term, epoch)
        self.broken = self._awaited = True
        return True

    def enter(self, term: int, epoch: int) -> bool:
        """Begin an epoch. False, and counted, when it is neither newer than the one in force nor the one awaited."""
        if (term, epoch) < (self.term, self.epoch) or ((term, epoch) == (self.term, self.epoch) and not self._awaited):
            self.stale += 1
            return False
        self.term, self.epoch = term, epoch
        self.wave = -1
        self.next_step = 0
        self.broken = self._awaited = False
        return True

    def is_stale(self, term: int, epoch: int) -> bool:
        """Whether a message of that epoch comes too late, which is counted."""
        if (term, epoch) < (self.term, self.epoch):
            self.stale += 1
            return True
        return False

    def admit(self, step: Step) -> bool:
        """Whether to run ``step``. False, and counted, when its epoch is over or has been broken by a fault.

        Raises:
            ProtocolError: its epoch was never configured, its number is not the next, or its wave went back.
        """
        if not self.in_force(step.term, step.epoch, step.step):
            return False
        if step.step < self.next_step:
            self.stale += 1  # a second copy of what has been run
            return False
        if step.step != self.next_step:
            raise self._refusal(step.step, f"step {step.step} found, step {self.next_step} is the next")
        if step.wave < self.wave:
            raise self._refusal(step.step, f"wave {step.wave} found after wave {self.wave}")
        self.next_step += 1
        self.wave = step.wave
        return True

    def in_force(self, term: int, epoch: int, step: int = -1) -> bool:
        """Whether a message of that epoch, with ``step`` if it is one, is to be obeyed. False, and counted, when the
        epoch is over or has been broken by a fault. Raises ProtocolError when it was never configured."""
        if self.is_stale(term, epoch):
            return False
        if (term, epoch) != (self.term, self.epoch):
            text = f"epoch ({term}, {epoch}) is not configured; in force: ({self.term}, {self.epoch})"
            raise self._refusal(step, text)
        self.stale += self.broken
        return not self.broken

    def break_epoch(self) -> None:
        """Nothing more of this epoch is run: the table may stand anywhere after a fault."""
        self.broken = True

    def _refusal(self, step: int, text: str) -> ProtocolError:
        return ProtocolError(text, ErrorInfo(kind="protocol", text=text, epoch=self.epoch, step=step))
