"""Ranks, coordinators and planners that end while experts move: one engine, one fault after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from drumline.engine.config import EngineConfig, EPLBConfig, FaultConfig
from drumline.engine.testing import FaultyEngine
from drumline.engine.testing.census import role_of
from drumline.engine.testing.processes import Process, family
from drumline.protocol.errors import DrumlineError
from drumline.protocol.messages import I32Matrix, RebalanceReport
from drumline.protocol.status import EngineStatus, EplbStatus
from tests.faults.expert_state import EXTENSION, ExpertState, ExpertWatch
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import WITHIN_S, Streams, requests

EXPERT_BYTES = 3 * 192 * 64 * 4
"""Of the demo model, in one layer."""
SLOWLY = EPLBConfig(
    num_redundant_experts=4, step_interval=1 << 30, window_size=64, load_interval=8, bytes_per_step=EXPERT_BYTES // 2
)
"""Each expert in two parts, one of them a step, so that every phase takes some steps."""
STREAMS = 16
DEADLINE_S = 1.5
ATTEMPTS = 5
"""At a death in the middle of a plan, which may be over before it."""


def balanced(layout: str, eplb: EPLBConfig = SLOWLY) -> EngineConfig:
    """One of the layouts with experts that may move."""
    config = LAYOUTS[layout]
    parallel = msgspec.structs.replace(
        config.parallel, enable_eplb=True, eplb_config=eplb, worker_extension_cls=EXTENSION
    )
    faults = FaultConfig(step_deadline_s=DEADLINE_S, restart_limit=1000)
    return msgspec.structs.replace(config, parallel=parallel, faults=faults)


@dataclass
class Shuffles:
    """A running engine under load. ``done``: the phases in which something has ended."""

    faulty: FaultyEngine
    streams: Streams
    watch: ExpertWatch
    state: ExpertState
    done: list[str] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def of(cls, config: EngineConfig) -> AsyncIterator[Shuffles]:
        """With its streams running; in the end each has said what it says undisturbed."""
        async with FaultyEngine(config) as faulty:
            streams = await Streams.learned(faulty.engine, requests(STREAMS))
            async with streams.running():
                await streams.move_on()
                watch = ExpertWatch(faulty.engine)
                shuffles = cls(faulty, streams, watch, await watch.look())
                yield shuffles
            status = await faulty.engine.status()
            assert status.requests.failed == status.requests.cancelled == 0
            print("\n" + streams.report(f"{', '.join(shuffles.done)}"))

    # --------------------------------------------------------------------------------------------------------- phases

    async def kill_while_planning(self, rank: int) -> None:
        """The planner works, and does not come to its end, when the rank does."""
        async with self._moving("planning", "cancelled") as moving:
            planner = await self._planner()
            try:
                await planner.stop()
                report = await moving()
                await self._until(lambda eplb: eplb.state == "planning", "no plan is being made")
                await self.faulty.kill(rank)
                await self._ended(report)
            finally:
                planner.wake()
                planner.close()

    async def kill_at(self, point: str, rank: int) -> None:
        """``staging``: parts of an expert have been started; ``commit``: a layer has just got its new experts."""
        async with self._moving(point, "cancelled") as moving:
            order = asyncio.create_task(self.faulty.kill(rank, at=point))
            await asyncio.sleep(0.05)
            report = await moving()
            await order
            await self._ended(report)

    async def kill_when_half_are_staged(self, rank: int, of_those: bool) -> None:
        """All ranks but ``rank`` are known to be Staged, when it ends, or one of those does."""
        async with self._moving("half staged", "cancelled") as moving:
            lost = asyncio.create_task(self.faulty.drop(["Staged"], [rank], direction="from_worker", times=1))
            await asyncio.sleep(0.05)
            report = await moving()
            await lost
            victim = (rank + 1) % self._ranks if of_those else rank
            await self.faulty.kill(victim)
            await self._ended(report)

    async def kill_after_the_commit(self, rank: int) -> None:
        """The first layer has its new experts, and they are on their way from the buffers to their slots."""
        async with self._moving("after the commit", "cancelled") as moving:
            for _ in range(ATTEMPTS):
                report = await moving()
                deadline = time.monotonic() + WITHIN_S
                while (await self._placement() == self.state.placement).all():
                    assert time.monotonic() < deadline, "no layer was committed"
                await self.faulty.kill(rank)
                async with asyncio.timeout(WITHIN_S):
                    outcome = (await report).outcome
                if outcome != "moved":
                    break
                await self._was_over()
            assert outcome == self._outcome

    async def stop_at_staging(self, rank: int, seconds: float) -> None:
        """The rank sleeps with parts of an expert on their way, and is replaced."""
        async with self._moving("stopped", "cancelled") as moving:
            order = asyncio.create_task(self.faulty.pause(rank, seconds, at="staging"))
            await asyncio.sleep(0.05)
            report = await moving()
            stopped = await order
            await self._ended(report)
            await self.streams.move_on()
            assert time.monotonic() - stopped.at < seconds, "streams waited for the sleeper"

    async def kill_coordinator(self) -> None:
        """In the middle of a layer: whoever asked for the plan is told that he may ask again."""
        async with self._moving("coordinator", "") as moving:
            for _ in range(ATTEMPTS):
                report = await moving()
                await self._until_moving(report)
                await self.faulty.kill_coordinator()
                async with asyncio.timeout(WITHIN_S):
                    (answer,) = await asyncio.gather(report, return_exceptions=True)
                if isinstance(answer, BaseException):
                    break
                await self._was_over()
            assert isinstance(answer, DrumlineError), answer
            assert answer.retryable, answer

    async def kill_planner(self) -> None:
        """In the middle of a plan, which fails; no rank notices."""
        epoch = (await self._status()).groups[0].epoch
        async with self._moving("planner", "failed") as moving:
            planner = await self._planner()
            try:
                await planner.stop()
                report = await moving()
                await self._until(lambda eplb: eplb.state == "planning", "no plan is being made")
                await self.faulty.kill_planner()
                assert planner.gone
                await self._ended(report)
            finally:
                planner.close()
        assert (await self._status()).groups[0].epoch == epoch

    # ---------------------------------------------------------------------------------------------------------- checks

    @asynccontextmanager
    async def _moving(
        self, phase: str, outcome: str
    ) -> AsyncIterator[Callable[[], Awaitable[asyncio.Task[RebalanceReport]]]]:
        """Around a fault: streams go on, every slot is as it should be, and the next plan is carried out. What is given
        asks for another placement; that comes to ``outcome``."""
        injected = len(self.faulty.injected)
        self._outcome = outcome

        async def moving() -> asyncio.Task[RebalanceReport]:
            return asyncio.create_task(self.faulty.engine.rebalance_experts(self.state.turned))

        yield moving
        assert len(self.faulty.injected) > injected
        await self.streams.move_on()
        await self.faulty.until_whole()
        self.state = await self.watch.look()
        await self.move_on_to_another()
        self.done.append(phase)

    async def move_on_to_another(self) -> None:
        """The next plan is carried out."""
        wanted = self.state.turned
        report = await self.faulty.engine.rebalance_experts(wanted)
        assert report.outcome == "moved", report
        self.state = await self.watch.look()
        assert (self.state.placement == wanted).all()

    async def _was_over(self) -> None:
        """All had been moved by the time of the death."""
        await self.faulty.until_whole()
        self.state = await self.watch.look()

    async def _ended(self, report: asyncio.Task[RebalanceReport]) -> None:
        async with asyncio.timeout(WITHIN_S):
            assert (await report).outcome == self._outcome, report.result()

    @property
    def _ranks(self) -> int:
        return self.faulty.engine.config.parallel.world_size_across_dp

    async def _status(self) -> EngineStatus:
        return await self.faulty.engine.status()

    async def _placement(self) -> I32Matrix:
        return (await self.faulty.engine.expert_load()).physical_to_logical

    async def _until(self, condition: Callable[[EplbStatus], bool], what: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while True:
            eplb = (await self._status()).eplb
            assert eplb is not None
            if condition(eplb):
                return
            assert time.monotonic() < deadline, f"{what}: {eplb}"
            await asyncio.sleep(0.002)

    async def _until_moving(self, report: asyncio.Task[RebalanceReport]) -> None:
        await self._until(lambda eplb: eplb.state == "moving" or report.done(), "nothing moves")

    async def _planner(self) -> Process:
        """The planner's process, which the first plan starts."""
        supervisor = (await self._status()).supervisor.pid
        for _ in range(2):
            for pid in family(supervisor):
                if role_of(pid) == "planner":
                    return Process(pid, "the planner")
            await self.watch.at_rest()
            await self.faulty.engine.rebalance_experts()
        raise AssertionError("no planner was started for a plan")
