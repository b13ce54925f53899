"""Operations that may hang, under a deadline that is kept.

torch's store client does not keep its own timeouts: a peer that accepts and never answers, or a store whose process is
stopped, hangs it for good. So every operation runs on a thread of its own, which is left behind when time is up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from drumline.protocol.errors import DrumlineError

R = TypeVar("R")

_LOOK_S = 0.05
_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01


class StoreError(DrumlineError):
    """The epoch's store, or a peer that was waited for there, did not answer in time. A new epoch may do better."""

    kind = "store"
    retryable = True


class Call:
    """One operation under a deadline, as its caller and its thread both see it.

    The thread is to answer at ``answer_by``, 3 % (30 ms at most) before the timeout, and is given up at ``give_up_at``,
    4 % after it (10 ms to 0.5 s): in between it finds out who is missing, so that both ends stay within 10 %.
    """

    def __init__(self, what: str, timeout_s: float, began: float | None = None) -> None:
        """``what`` begins the text of errors. A timeout of 0 or less gives the operation 10 ms. The time counts from
        ``began`` (monotonic seconds), now if it is None."""
        self.what = what
        self.timeout_s = max(0.0, timeout_s)
        self.stopped = threading.Event()
        """Set when nobody waits for the operation any more."""
        self.unseen: tuple[int, ...] = ()
        """The ranks that the operation waits for, as far as is known."""
        self.lack = "nothing from"
        """What is waited for; the ranks follow it in errors."""
        self._began = time.monotonic() if began is None else began
        self._next_look = self.timeout_s / 8
        end = self._began + self.timeout_s
        self.answer_by = end - min(0.03 * self.timeout_s, 0.03)
        self.give_up_at = end + min(max(0.04 * self.timeout_s, 0.01), 0.5)

    @property
    def left_s(self) -> float:
        """Seconds until the thread is to answer, at least 0."""
        return max(0.0, self.answer_by - time.monotonic())

    def over(self) -> bool:
        """Whether the thread should stop asking and say what it knows."""
        return self.stopped.is_set() or time.monotonic() >= self.answer_by

    def look_due(self) -> bool:
        """True once after an eighth, a quarter and a half of the time: moments to look who is missing."""
        due = time.monotonic() - self._began >= self._next_look
        if due:
            self._next_look *= 2
        return due

    def late(self, why: str = "") -> StoreError:
        """The error of an operation that ran out of time; names the ranks in ``unseen``."""
        return StoreError(f"{self.what}: {self.missing() or 'no answer'} within {self.timeout_s:g} s{why}")

    def missing(self) -> str:
        """What is missing of the ranks in ``unseen``, as far as is known; "" if there are none."""
        return f"{self.lack} rank {', '.join(map(str, self.unseen))}" if self.unseen else ""


def poll(call: Call, look: Callable[[], R | None]) -> R | None:
    """The first answer of ``look`` that is not None, asked at growing intervals up to 10 ms; None when time is up."""
    pause = _FIRST_PAUSE_S
    while (found := look()) is None:
        if call.over():
            return None
        time.sleep(min(pause, call.left_s))
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    return found


def run_bounded(call: Call, operation: Callable[[Call], R], abandoned: threading.Event | None = None) -> R:
    """Run ``operation`` on a daemon thread and leave it behind when it is not back in time.

    A thread that is left behind ends when the connection it hangs on does. Raises what ``operation`` raised, with
    RuntimeError, torch's own, as StoreError; StoreError when time is up or ``abandoned`` is set.
    """
    done = threading.Event()
    results: list[R] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(operation(call))
        except BaseException as error:  # carried to the thread that waits
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=body, name=f"drumline: {call.what}", daemon=True).start()
    try:
        while not done.wait(max(0.0, min(_LOOK_S, call.give_up_at - time.monotonic()))):
            if abandoned is not None and abandoned.is_set():
                raise StoreError(f"{call.what}: abandoned")
            if time.monotonic() >= call.give_up_at:
                raise call.late("; the store does not answer" if call.unseen else "")
    except BaseException:
        call.stopped.set()
        raise
    if not failures:
        return results[0]
    error = failures[0]
    if isinstance(error, DrumlineError) or not isinstance(error, RuntimeError):
        raise error
    # torch adds a C++ trace after the first line.
    reason = str(error).partition("\n")[0]
    missing = call.missing()
    raise StoreError(f"{call.what}: {reason}{missing and f'; {missing} so far'}") from error
