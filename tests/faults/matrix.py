"""Every rank of a layout, killed at every point: one engine, one fault after the other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.testing import FaultyEngine, InjectedFault
from drumline.protocol.messages import Event
from drumline.protocol.status import EngineStatus
from tests.faults.streams import Gaps, Streams
from tests.procfs import is_alive

POINTS = ("idle", "prefill", "decode", "regroup", "joining", "loading")
LOADS_S = 60.0


def demo(**parallel: int | bool) -> EngineConfig:
    return EngineConfig("demo", parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]


LAYOUTS = {
    "dp2-ep": demo(data_parallel_size=2, enable_expert_parallel=True),
    "dp4-ep": demo(data_parallel_size=4, enable_expert_parallel=True),
    "tp2-dp2-ep": demo(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True),
    "pp2-dp2-ep": demo(pipeline_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True),
    "tp2-dp2": demo(tensor_parallel_size=2, data_parallel_size=2),
}
"""Those of the demo model; ``llama-dp2`` needs a checkpoint."""


def dense(folder: os.PathLike[str]) -> EngineConfig:
    """Two replicas that have nothing to do with one another."""
    return EngineConfig(os.fspath(folder), parallel=ParallelConfig(data_parallel_size=2))


@dataclass
class Matrix:
    """A running engine, its streams, and what came of the faults by point."""

    faulty: FaultyEngine
    streams: Streams
    told: list[tuple[float, Event]]
    gaps: dict[str, Gaps] = field(default_factory=dict)

    async def kill(self, point: str, rank: int) -> None:
        """Kill ``rank`` at ``point`` and see to it that nothing came of that but a pause."""
        before = await self.faulty.engine.status()
        count = len(self.faulty.injected)
        moment = time.monotonic()
        await (self._idle(rank) if point == "idle" else self._running(point, rank, before))
        await self.streams.equal()
        await self.faulty.until_whole(LOADS_S)
        self._check(await self.faulty.engine.status(), before, self.faulty.injected[count:])
        for at in self._deaths(moment):
            self.gaps.setdefault(point, Gaps()).add(self.streams.gaps(at))

    async def _idle(self, rank: int) -> None:
        await self.faulty.kill(rank, at="idle")
        self.streams.start()

    async def _running(self, point: str, rank: int, before: EngineStatus) -> None:
        if point == "prefill":
            order = await _ordered(self.faulty.kill(rank, at=point))
            self.streams.start()
        else:
            self.streams.start()
            await self.streams.decoding()
            order = await _ordered(self.faulty.kill(rank, at=point))
        # What is to happen in a regroup, or to a replacement, needs another death first.
        if point == "regroup":
            await self.faulty.kill(_other(rank, before))
        elif point in ("joining", "loading"):
            await self.faulty.kill(rank)
        await order

    def _deaths(self, since: float) -> list[float]:
        """When ranks began to be lost, as the engine told."""
        return [at for at, event in self.told if at > since and event.kind == "fault" and event.fault == "exit"]

    def _check(self, after: EngineStatus, before: EngineStatus, injected: Sequence[InjectedFault]) -> None:
        assert injected
        for fault in injected:
            assert fault.kind == "kill"
            assert fault.pid == 0 or not is_alive(fault.pid)
        for rank in {fault.rank for fault in injected}:
            deaths = sum(fault.rank == rank for fault in injected)
            assert after.ranks[rank].pid != before.ranks[rank].pid
            assert after.ranks[rank].restarts == before.ranks[rank].restarts + deaths
        killed = {fault.rank for fault in injected}
        kept = [
            (old.pid, new.pid) for old, new in zip(before.ranks, after.ranks, strict=True) if old.rank not in killed
        ]
        assert all(old == new for old, new in kept), f"ranks that nobody killed were replaced: {kept}"
        assert after.requests.failed == after.requests.cancelled == 0


async def _ordered(order: Coroutine[object, object, InjectedFault]) -> asyncio.Task[InjectedFault]:
    task = asyncio.create_task(order)
    await asyncio.sleep(0.05)
    return task


def _other(rank: int, status: EngineStatus) -> int:
    """Whose death ``rank`` is to see as a survivor: one of its own replica, so that another goes on, if there is one."""
    own = status.ranks[rank].dp_rank
    return max((one for one in status.ranks if one.rank != rank), key=lambda one: (one.dp_rank == own, -one.rank)).rank


async def run(config: EngineConfig, faults: Sequence[tuple[str, int]], tokens: int) -> dict[str, Gaps]:
    """One engine, one fault (its point and rank) after the other; returns the times to the next token by point."""
    told: list[tuple[float, Event]] = []
    async with FaultyEngine(config, on_event=lambda event: told.append((time.monotonic(), event))) as faulty:
        streams = Streams(faulty.engine, tokens)
        await streams.undisturbed()
        matrix = Matrix(faulty, streams, told)
        for point, rank in faults:
            await matrix.kill(point, rank)
        assert streams.ties <= max(1, streams.compared // 500), f"{streams.ties} ties of {streams.compared}"
        return matrix.gaps
