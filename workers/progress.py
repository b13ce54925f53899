"""What the main thread is doing, for the control thread to tell.

The main thread writes, the control thread reads; each value is replaced as a whole, so that a reader never sees half of
a change.
"""

from __future__ import annotations

from typing import NamedTuple


class Position(NamedTuple):
    """Where a rank is: the epoch in force (-1: none yet), the ``step`` that runs or ran last in it (-1: none), how many
    collectives that step has entered, and whether it is ``inside`` one now."""

    term: int = -1
    epoch: int = -1
    step: int = -1
    collective: int = 0
    inside: bool = False


class Progress:
    """The progress record of one rank."""

    def __init__(self) -> None:
        self.position = Position()
        self.load_done = 0
        self.load_total = 0
        #: Of the configuration that the weights were loaded for, empty until they are.
        self.loaded_digest = ""
        self.steps = 0
        self.dummy_steps = 0
        self.stale = 0
        self.faults = 0

    def enter_epoch(self, term: int, epoch: int) -> None:
        """The epoch is in force, and no step of it has run."""
        self.position = Position(term, epoch)

    def begin_step(self, step: int, dummy: bool) -> None:
        """``step`` runs and has entered no collective. ``dummy``: this replica has no tokens in it."""
        term, epoch, *_ = self.position
        self.position = Position(term, epoch, step)
        self.steps += 1
        self.dummy_steps += dummy

    def enter_collective(self) -> None:
        """The next collective of the step is entered: from here on this rank may wait for others."""
        term, epoch, step, collective, _ = self.position
        self.position = Position(term, epoch, step, collective + 1, True)

    def leave_collective(self) -> None:
        """The collective is over, or failed. It stays counted."""
        term, epoch, step, collective, _ = self.position
        self.position = Position(term, epoch, step, collective, False)

    def loaded(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of weights have been read."""
        self.load_done, self.load_total = done, total
