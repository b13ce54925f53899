"""Processes as /proc shows them."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def pids() -> list[int]:
    """All processes, ascending."""
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, which is its third. Raises OSError when it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def name(pid: int) -> str:
    """What the process calls itself, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def command(pid: int) -> str:
    """Its command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def has_environment(pid: int, entry: str) -> bool:
    """Whether ``NAME=value`` stood in its environment when it was started."""
    try:
        return entry.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        return stat(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def session(pid: int) -> int:
    return int(stat(pid)[3])


def cpu_seconds(pid: int) -> float:
    """User and system time so far."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def maps(pid: int) -> str:
    """What it has mapped, libraries by their paths."""
    return Path(f"/proc/{pid}/maps").read_text()


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def descendants(pid: int) -> list[int]:
    """Its living children, theirs, and so on."""
    parents: dict[int, int] = {}
    for one in pids():
        try:
            parents[one] = int(stat(one)[1])
        except OSError:
            continue
    found, grown = {pid}, True
    while grown:
        more = {one for one, parent in parents.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return sorted(found - {pid})
