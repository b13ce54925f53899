"""Ctrl-C for a command that has started an engine."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence


def interrupt_when_ready(command: Sequence[str]) -> int:
    """Run ``command``, interrupt it once its engine is ready, and return its exit status."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "ready in" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        return process.wait(20.0)
