"""What an engine holds of its machine: memory, file descriptors, sockets, shared memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from drumline.engine.launch import coordinator_keeper, forkserver_pipe, planner
from drumline.engine.testing.processes import command, family, name

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ROLES = {
    "coordinator": coordinator_keeper.MODULE,
    "forkserver": forkserver_pipe.MODULE,
    "planner": planner.MODULE,
    "supervisor": "drumline.engine.supervisor",
}


class Holding(msgspec.Struct, frozen=True):
    """Of the processes of one role together."""

    processes: int = 0
    rss_bytes: int = 0
    threads: int = 0
    file_descriptors: int = 0
    sockets: int = 0

    def __add__(self, other: Holding) -> Holding:
        return Holding(
            *(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True))
        )


class Census(msgspec.Struct, frozen=True):
    """``roles``: app, supervisor, coordinator, forkserver, planner, ranks and other. ``shared_memory``: entries of
    /dev/shm."""

    roles: dict[str, Holding]
    shared_memory: int

    @property
    def total(self) -> Holding:
        """Of all roles."""
        return sum(self.roles.values(), Holding())


def take_census(supervisor_pid: int) -> Census:
    """Of this process and the family of the supervisor, at this moment."""
    roles = {"app": _holding(os.getpid())}
    for pid in family(supervisor_pid):
        role = role_of(pid)
        roles[role] = roles.get(role, Holding()) + _holding(pid)
    shared = Path("/dev/shm")
    return Census(dict(sorted(roles.items())), len(list(shared.iterdir())) if shared.is_dir() else 0)


def role_of(pid: int) -> str:
    """What a process of an engine is, as in :class:`Census`."""
    if name(pid).startswith("drumline:r"):
        return "ranks"
    line = command(pid)
    return next((role for role, module in _ROLES.items() if module in line), "other")


def _holding(pid: int) -> Holding:
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        threads = len(list((folder / "task").iterdir()))
        targets = [_target(entry) for entry in (folder / "fd").iterdir()]
    except (OSError, IndexError, ValueError):
        return Holding()  # it has just ended
    return Holding(1, pages * _PAGE, threads, len(targets), sum(target.startswith("socket:") for target in targets))


def _target(descriptor: Path) -> str:
    with contextlib.suppress(OSError):
        return str(descriptor.readlink())
    return ""
