"""Who starts the ranks of this host: one process alone (uni), a forkserver (mp), or nobody here (external_launcher)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from drumline.engine.launch.forkserver import Forkserver
from drumline.engine.launch.one_worker import OneWorker
from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.messages import Exited, Spawned


class RankProcesses(Protocol):
    """The worker processes of this host."""

    @property
    def workers(self) -> dict[int, int]:
        """Rank by pid."""

    @property
    def no_workers(self) -> asyncio.Event:
        """Set while there is none."""

    @property
    def pids(self) -> set[int]:
        """Every process that this waits for."""

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Start a worker, which is then told by ``on_spawned``."""

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker; one that has ended already is left alone."""

    def close(self) -> None:
        """End every worker at once."""

    def kill_all(self, number: int) -> None:
        """Send a signal to everything that this owns."""

    async def wait(self, timeout: float) -> bool:
        """Whether everything that this owns has ended within ``timeout`` seconds."""


def rank_processes(
    loop: asyncio.AbstractEventLoop,
    parallel: ParallelConfig,
    endpoint: str,
    *,
    on_spawned: Callable[[Spawned], None],
    on_exited: Callable[[Exited], None],
    on_lost: Callable[[str], None],
    import_path: Sequence[str] = (),
    restart_limit: int = 5,
) -> RankProcesses | None:
    """What starts the ranks of this host, as ``parallel`` says; None when it starts none of them.

    ``endpoint``: the coordinator's worker socket. ``import_path``: where ranks find the modules of the app.
    """
    if not parallel.local_ranks:
        return None
    if parallel.executor_backend == "uni":
        return OneWorker(loop, endpoint, on_spawned=on_spawned, on_exited=on_exited, import_path=import_path)
    return Forkserver(
        loop,
        on_spawned=on_spawned,
        on_exited=on_exited,
        on_lost=on_lost,
        import_path=import_path,
        restart_limit=restart_limit,
    )
