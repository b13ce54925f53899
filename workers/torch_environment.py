"""What torch and OpenMP are told before they are loaded."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Let OpenMP threads sleep at a barrier instead of spinning there. Call before torch is imported.

    A spinning thread uses up its share of a core and is then set aside for milliseconds, in which all others wait for
    it: with one core busy elsewhere, a decode step of the demo model on two threads took 57 ms, and 7 ms with sleeping
    threads. Whoever has set OMP_WAIT_POLICY keeps it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def leave_losses_to_us() -> None:
    """Keep torch's own warnings of lost connections, with the frames of C++ they come from, out of stderr: which rank
    went is told by the engine. Call before torch is imported; whoever has set TORCH_CPP_LOG_LEVEL keeps it."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
