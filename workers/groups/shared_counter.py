"""A number in memory that processes share: one of them raises it, others wait until it is high enough.

A reader spins for a while, giving way to whoever wants to run, and then sleeps in the kernel (futex). Whatever was
written before the number was raised is visible to whoever sees it raised, on x86-64.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

SPIN_S = 100e-6
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_ALL_WAITERS = 0x7FFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SharedCounter:
    """The int64 at ``index`` of ``words``, which lie at ``address`` in this process."""

    def __init__(self, words: memoryview, index: int, address: int) -> None:
        self._words = words
        self._index = index
        self._address = ctypes.c_void_p(address + 8 * index)
        self._limit = _Timespec(0, 0)
        self._limit_reference = ctypes.byref(self._limit)

    @property
    def value(self) -> int:
        """The number now."""
        return int(self._words[self._index])

    def raise_to(self, value: int) -> None:
        """Only one process does this."""
        self._words[self._index] = value
        self.wake()

    def wake(self) -> None:
        """Let all who sleep look again."""
        _libc.syscall(_SYS_FUTEX, self._address, _FUTEX_WAKE, _ALL_WAITERS, None, None, 0)

    def wait(self, value: int, slice_s: float, hopeless: Callable[[], object]) -> bool:
        """Whether the number reaches ``value`` within ``slice_s``, which is below 1.

        Does not sleep while ``hopeless()``. Every return of the kernel, a signal or a timeout too, only means that it
        is time to look again.
        """
        words, index = self._words, self._index
        # By the clock: where others want the core, giving way once may take longer than all of this.
        end = time.perf_counter() + SPIN_S
        while True:
            if words[index] >= value:
                return True
            if time.perf_counter() >= end:
                break
            os.sched_yield()
        seen = words[index]
        if seen < value and not hopeless():
            self._limit.nanoseconds = int(slice_s * 1e9)
            low = ctypes.c_uint32(seen & 0xFFFFFFFF)
            _libc.syscall(_SYS_FUTEX, self._address, _FUTEX_WAIT, low, self._limit_reference, None, 0)
        return bool(words[index] >= value)
