"""A supervisor inherits what its own children leave behind: the kernel makes it the parent of their orphans."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """From here on processes whose parent has died become children of this one, if it is an ancestor."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(pid: int) -> tuple[int, int] | None:
    """Exit status and signal of a child that has ended, None while it lives or when it is not a child of ours."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return (found.si_status, 0) if found.si_code == os.CLD_EXITED else (0, found.si_status)


def children() -> list[int]:
    """The processes whose parent this one is, ended ones included."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:  # the thread has ended meanwhile
            continue
    return found


def runs_module(pid: int, module: str) -> bool:
    """Whether a process was started as ``python -m module``, or forked from one that was."""
    try:
        return module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def reap_orphans(known: Collection[int]) -> None:
    """Let go of children that have ended and that nobody here waits for; ``known`` are waited for elsewhere."""
    for child in children():
        if child not in known:
            reap(child)
