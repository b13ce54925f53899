"""What OpenMP is told before torch loads it."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Let OpenMP threads sleep at a barrier instead of spinning there. Call before torch is imported.

    A spinning thread uses up its share of a core and is then set aside for milliseconds, in which all others wait for
    it: with one core busy elsewhere, a decode step of the demo model on two threads took 57 ms, and 7 ms with sleeping
    threads. Whoever has set OMP_WAIT_POLICY keeps it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
