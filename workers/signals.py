"""Signals as something to poll. Must be called on the main thread."""

from __future__ import annotations

import os
import signal


def take_signals() -> int:
    """A descriptor that becomes readable at SIGTERM, whatever the main thread is busy with.

    SIGINT is ignored: Ctrl-C in a terminal reaches every process of an app, and the app decides what it means.
    """
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    return read_end


def release_signals() -> None:
    """In a forked child: close what the parent's :func:`take_signals` made here, and restore the defaults."""
    write_end = signal.set_wakeup_fd(-1)
    if write_end >= 0:
        os.close(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
