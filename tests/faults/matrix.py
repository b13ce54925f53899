"""Every rank of a layout, killed at every point: one engine, one fault after the other."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.testing import FaultyEngine, InjectedFault
from drumline.protocol.messages import Event
from drumline.protocol.status import EngineStatus
from tests.faults.streams import Streams, requests
from tests.procfs import is_alive

POINTS = ("idle", "prefill", "decode", "regroup", "joining", "loading")


def demo(**parallel: int | bool) -> EngineConfig:
    return EngineConfig("demo", parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]


LAYOUTS = {
    "dp2-ep": demo(data_parallel_size=2, enable_expert_parallel=True),
    "dp4-ep": demo(data_parallel_size=4, enable_expert_parallel=True),
    "tp2-dp2-ep": demo(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True),
    "pp2-dp2-ep": demo(pipeline_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True),
    "tp2-dp2": demo(tensor_parallel_size=2, data_parallel_size=2),
}
"""Those of the demo model; that of :func:`dense` needs a checkpoint."""


def dense(folder: os.PathLike[str]) -> EngineConfig:
    """Two replicas that have nothing to do with one another."""
    return EngineConfig(os.fspath(folder), parallel=ParallelConfig(data_parallel_size=2))


@dataclass
class Matrix:
    """A running engine and its streams. ``point``: where the fault under way happens."""

    faulty: FaultyEngine
    streams: Streams
    point: str = ""
    kills: int = 0

    def take(self, event: Event) -> None:
        """An event of the engine: a rank is about to kill itself, or found to be gone."""
        if event.kind == "injected":
            self.streams.fault(self.point, known=False)
        elif event.kind == "fault":
            self.streams.gaps.told()

    async def at_idle(self, rank: int) -> None:
        """Kill ``rank`` while nothing runs; requests come at once."""
        async with self._checked("idle"):
            await self.faulty.kill(rank, at="idle")
            async with self.streams.running():
                await self.streams.move_on()

    async def under_load(self, point: str, rank: int) -> None:
        """Kill ``rank`` at ``point`` while the streams run."""
        async with self._checked(point):
            order = await _ordered(self.faulty.kill(rank, at=point))
            # What is to happen in a regroup, or to a replacement, needs another death first.
            if point == "regroup":
                await self._kill_now(_other(rank, await self.faulty.engine.status()))
            elif point in ("joining", "loading"):
                await self._kill_now(rank)
            await order
            await self.streams.move_on()

    async def some(self, pending: deque[tuple[str, int]], more: Callable[[], bool]) -> None:
        """The first of the ``pending`` faults, and under load all that follow up to the next at idle."""
        if pending[0][0] == "idle":
            await self.at_idle(pending.popleft()[1])
            return
        async with self.streams.running():
            await self.streams.move_on()
            await self.under_load(*pending.popleft())
            while pending and pending[0][0] != "idle" and more():
                await self.under_load(*pending.popleft())

    async def _kill_now(self, rank: int) -> None:
        self.streams.fault(self.point, known=False)
        await self.faulty.kill(rank)

    def _checked(self, point: str) -> _Checked:
        self.point = point
        return _Checked(self)


class _Checked:
    """Around one fault: it killed whom it was to kill, nobody else was replaced, and the engine is whole again."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._count = len(matrix.faulty.injected)
        self._before: EngineStatus | None = None

    async def __aenter__(self) -> None:
        self._before = await self._matrix.faulty.engine.status()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        faulty, before = self._matrix.faulty, self._before
        assert before is not None
        await faulty.until_whole()
        after = await faulty.engine.status()
        injected = faulty.injected[self._count :]
        assert injected
        for fault in injected:
            assert fault.kind == "kill"
            assert fault.pid == 0 or not is_alive(fault.pid)
        for old, new in zip(before.ranks, after.ranks, strict=True):
            deaths = sum(fault.rank == old.rank for fault in injected)
            assert new.restarts == old.restarts + deaths
            assert (new.pid != old.pid) == (deaths > 0), f"rank {old.rank}: pid {old.pid}, then {new.pid}"
        assert after.requests.failed == after.requests.cancelled == 0
        self._matrix.kills += len(injected)


async def _ordered(order: Coroutine[object, object, InjectedFault]) -> asyncio.Task[InjectedFault]:
    task = asyncio.create_task(order)
    await asyncio.sleep(0.05)
    return task


def _other(rank: int, status: EngineStatus) -> int:
    """Whose death ``rank`` is to see as a survivor: if there is one, of its own replica, so that another goes on; the
    one before it, if it is alone in its group."""
    own = status.ranks[rank].dp_rank
    (peers,) = [group.replicas for group in status.groups if own in group.replicas]
    others = [one for one in status.ranks if one.rank != rank and one.dp_rank in peers]
    return max(others, key=lambda one: (one.dp_rank == own, -one.rank)).rank if others else rank


async def run(
    config: EngineConfig,
    faults: Sequence[tuple[str, int]],
    title: str,
    more: Callable[[], bool] = lambda: True,
) -> Streams:
    """One engine, one fault (point and rank) after the other, while there is to be ``more``."""
    matrix: Matrix | None = None

    def take(event: Event) -> None:
        if matrix is not None:
            matrix.take(event)

    async with FaultyEngine(config, on_event=take) as faulty:
        streams = await Streams.learned(faulty.engine, requests())
        matrix = Matrix(faulty, streams)
        pending = deque(faults)
        while pending and more():
            await matrix.some(pending, more)
        print("\n" + streams.report(title) + f"\n{title}: {matrix.kills} kills")
        return streams
