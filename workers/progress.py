"""What the main thread is doing, for the control thread to tell.

The main thread writes, the control thread reads; each value is replaced as a whole, so that a reader never sees half of
a change.
"""

from __future__ import annotations

import time
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
    """The progress record of one rank. ``busy``: a step runs, or an epoch forms. ``idle_since``: when the last step of
    the open epoch ended (monotonic seconds), None while one runs or no epoch is open."""

    def __init__(self) -> None:
        self.position = Position()
        self.load_done = 0
        self.load_total = 0
        #: Of the configuration that the weights were loaded for, empty until they are.
        self.loaded_digest = ""
        #: How long the step that runs may take, whatever recent ones took, in seconds; 0.0: no longer than those.
        self.lease_s = 0.0
        self._lease_ends_at = 0.0
        self.busy = False
        self.idle_since: float | None = None
        self.steps = 0
        self.dummy_steps = 0
        self.stale = 0
        self.faults = 0

    def enter_epoch(self, term: int, epoch: int) -> None:
        """The epoch is in force, and no step of it has run."""
        self.position = Position(term, epoch)

    def begin_forming(self) -> None:
        """The epoch's experts and groups are made: from here on this rank may wait for others."""
        self.busy = True

    def open_epoch(self) -> None:
        """The epoch is formed, and idle."""
        self.busy = False
        self.idle_since = time.monotonic()

    def leave_epoch(self) -> None:
        """No step runs, and none is to be expected."""
        self.idle_since = None
        self.busy = False
        self.lease_s = 0.0

    def grant_lease(self, lease_s: float) -> None:
        """The step that runs may take so long from now on."""
        self.lease_s = lease_s
        self._lease_ends_at = time.monotonic() + lease_s

    def lease_left(self) -> float:
        """How much of the lease is left. Each beat says it: one that said the whole again would make it endless."""
        return max(self._lease_ends_at - time.monotonic(), 0.0) if self.lease_s > 0 else 0.0

    def begin_step(self, step: int, dummy: bool) -> None:
        """``step`` runs and has entered no collective. ``dummy``: this replica has no tokens in it."""
        term, epoch, *_ = self.position
        self.position = Position(term, epoch, step)
        self.idle_since = None
        self.busy = True
        self.steps += 1
        self.dummy_steps += dummy

    def end_step(self) -> None:
        """The step is over."""
        self.busy = False
        self.idle_since = time.monotonic()

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
