"""Experts that move while streams run: what balance they come to, and what it costs the streams.

A real engine with skewed traffic, first prose and then code. For each, plans are asked for until there is nothing worth
moving, each from a load window that was counted under the placement before. Then all experts move to and fro in every
second of a number of equally long windows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np

from drumline.engine.bench.scheduler import Machine, machine
from drumline.engine.bench.shuffle_latency import LatencyFigures, Window, latency_figures
from drumline.engine.bench.shuffle_traffic import Traffic
from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.engine.testing.shuffling import Shuffling
from drumline.protocol.errors import DrumlineError
from drumline.protocol.messages import Event, RebalanceReport
from drumline.protocol.status import EngineStatus, EplbStatus

PLANS = 3
"""At most so many for one kind of traffic."""
MAX_TOKENS = 128
LOOK_S = 0.05
STANDS_STILL_S = 60.0
LEAST_WINDOW_S = 0.5


class ShufflePlan(msgspec.Struct, frozen=True):
    """``streams`` run at once. ``seconds``: how long latencies are measured, in windows of ``window_s``. ``seed``: of
    the traffic."""

    streams: int = 16
    seconds: float = 40.0
    window_s: float = 2.0
    seed: int = 0


class PlanFigures(msgspec.Struct, frozen=True):
    """One plan. ``balancedness_before`` and ``balancedness_after``: mean over layers of mean over busiest rank, as
    counted over a window of steps before it and one after it; ``balancedness_planned``: as predicted. ``steps``: that
    were run from when it was asked for until all experts were in their slots, in ``seconds``."""

    traffic: str
    outcome: str
    balancedness_before: float
    balancedness_planned: float
    balancedness_after: float
    slots_moved: int
    bytes_moved: int
    layers: int
    solve_ms: float
    seconds: float
    steps: int
    reason: str


class MovingFigures(msgspec.Struct, frozen=True):
    """The rebalances to and fro together. ``seconds_each`` and ``steps_each``: medians, from when one was asked for.
    ``mb_per_s``: 10^6 bytes between ranks per second of them, of all ranks together."""

    rebalances: int
    slots_moved: int
    bytes_moved: int
    layers: int
    seconds: float
    mb_per_s: float
    seconds_each: float
    steps_each: int


class ShuffleResult(msgspec.Struct, frozen=True, kw_only=True):
    """Of one engine. ``balancedness_*``: as counted over a window of steps: of prose before any plan and after all of
    its plans, of code before and after its plans. ``latency``: None when no pair of windows came to its end."""

    data_parallel_size: int
    ranks: int
    num_redundant_experts: int
    policy: str
    bytes_per_step: int
    streams: int
    tokens_per_s: float
    balancedness_start: float
    balancedness_prose: float
    balancedness_turned: float
    balancedness_code: float
    plans: tuple[PlanFigures, ...]
    moving: MovingFigures
    latency: LatencyFigures | None


class ShuffleReport(msgspec.Struct, frozen=True):
    """``results``: one per engine, in the order measured."""

    machine: Machine
    model: str
    results: tuple[ShuffleResult, ...]


Say = Callable[[str], None]


async def run(
    configs: list[EngineConfig],
    plan: ShufflePlan,
    start: Callable[[AsyncEngine], Awaitable[None]] | None = None,
    say: Say = lambda text: None,
    on_event: Callable[[Event], None] | None = None,
) -> ShuffleReport:
    """Measure an engine of each of ``configs``, all with ``enable_eplb``. ``start`` starts one; ``say`` is told what
    is under way."""
    results: list[ShuffleResult] = []
    for config in configs:
        engine = AsyncEngine(config, on_event=on_event)
        try:
            await (start(engine) if start is not None else engine.start())
            results.append(await _measured(engine, plan, say))
        finally:
            await engine.close()
    first = configs[0]
    return ShuffleReport(machine(), first.served_model_name or first.model, tuple(results))


async def _measured(engine: AsyncEngine, plan: ShufflePlan, say: Say) -> ShuffleResult:
    traffic = Traffic(engine, plan.streams, MAX_TOKENS, plan.seed)
    running = asyncio.create_task(traffic.run())
    measuring = asyncio.create_task(_Bench(engine, plan, traffic, say).run())
    try:
        await asyncio.wait([running, measuring], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        return await measuring
    finally:
        for task in (measuring, running):
            task.cancel()
        await asyncio.gather(measuring, running, return_exceptions=True)


class _Bench:
    """One engine under traffic."""

    def __init__(self, engine: AsyncEngine, plan: ShufflePlan, traffic: Traffic, say: Say) -> None:
        self._engine = engine
        self._plan = plan
        self._traffic = traffic
        self._say = say
        self._plans: list[PlanFigures] = []
        self._carried: list[tuple[RebalanceReport, int]] = []

    async def run(self) -> ShuffleResult:
        parallel = self._engine.config.parallel
        eplb = parallel.eplb_config
        start = await self._counted()
        prose = await self._plan_until_settled(start)
        self._say("the traffic turns from prose to code")
        self._traffic.kind = "code"
        turned = await self._counted(fresh=True)
        code = await self._plan_until_settled(turned)
        began, tokens = time.monotonic(), self._traffic.tokens
        windows = await self._alternate()
        return ShuffleResult(
            data_parallel_size=parallel.data_parallel_size,
            ranks=parallel.world_size_across_dp,
            num_redundant_experts=eplb.num_redundant_experts,
            policy=eplb.policy,
            bytes_per_step=eplb.bytes_per_step,
            streams=self._plan.streams,
            tokens_per_s=round((self._traffic.tokens - tokens) / (time.monotonic() - began), 1),
            balancedness_start=start,
            balancedness_prose=prose,
            balancedness_turned=turned,
            balancedness_code=code,
            plans=tuple(self._plans),
            moving=self._moving(),
            latency=latency_figures(windows, self._traffic.gaps),
        )

    # ---------------------------------------------------------------------------------------------------------- plans

    async def _plan_until_settled(self, balance: float) -> float:
        """Plan until nothing is worth moving; returns the balancedness that is counted then."""
        for number in range(PLANS):
            before, step = balance, await self._step()
            report = await self._engine.rebalance_experts()
            steps = await self._step() - step
            if report.outcome == "moved":
                balance = await self._counted()
            self._plans.append(
                PlanFigures(
                    traffic=self._traffic.kind,
                    outcome=report.outcome,
                    balancedness_before=before,
                    balancedness_planned=round(report.balancedness, 4),
                    balancedness_after=balance,
                    slots_moved=report.slots_moved,
                    bytes_moved=report.bytes_moved,
                    layers=report.layers,
                    solve_ms=round(report.solve_ms, 2),
                    seconds=round(report.seconds, 4),
                    steps=steps,
                    reason=report.reason,
                )
            )
            self._say(
                f"plan {number + 1} for {self._traffic.kind}: {report.outcome}, {report.slots_moved} slots, "
                f"balancedness {before:.3f}, then {balance:.3f}"
            )
            if report.outcome != "moved":
                break
        return balance

    async def _counted(self, fresh: bool = False) -> float:
        """The balancedness over a whole window of steps under the placement in force; with ``fresh``, of steps that
        come from now on."""
        least = self._engine.config.parallel.eplb_config.window_size
        since = last = await self._step()
        moved_at = time.monotonic()
        while time.monotonic() < moved_at + STANDS_STILL_S:
            status = await self._engine.status()
            eplb, step = _eplb(status), status.groups[0].step
            if step != last:
                last, moved_at = step, time.monotonic()
            if eplb.window_steps >= least and (not fresh or step >= since + least):
                return round(eplb.balancedness, 4)
            await asyncio.sleep(LOOK_S)
        raise DrumlineError(f"no step was run for {STANDS_STILL_S:g} s")

    async def _step(self) -> int:
        return (await self._engine.status()).groups[0].step

    # -------------------------------------------------------------------------------------------------------- windows

    async def _alternate(self) -> list[Window]:
        """Pairs of windows, the moving one first in every other pair."""
        shuffling = await Shuffling.of(self._engine)
        pairs = max(1, round(self._plan.seconds / (2 * self._plan.window_s)))
        windows: list[Window] = []
        for pair in range(pairs):
            windows += [await self._window(shuffling, moving) for moving in (pair % 2 == 1, pair % 2 == 0)]
            figures = latency_figures(windows, self._traffic.gaps)
            if figures is not None:
                self._say(
                    f"windows {2 * (pair + 1)} of {2 * pairs}: p99 {figures.p99_still_ms:.1f} ms still, "
                    f"{figures.p99_moving_ms:.1f} ms while experts move"
                )
        return windows

    async def _window(self, shuffling: Shuffling, moving: bool) -> Window:
        start = time.monotonic()
        if not moving:
            await asyncio.sleep(self._plan.window_s)
        while moving and time.monotonic() < start + self._plan.window_s:
            step = await self._step()
            report = await shuffling.once()
            if report.outcome != "moved":
                raise DrumlineError(f"a rebalance to another placement came to {report.outcome}: {report.reason}")
            self._carried.append((report, await self._step() - step))
        return Window(moving, start, time.monotonic())

    def _moving(self) -> MovingFigures:
        reports = [report for report, _ in self._carried]
        seconds = sum(report.seconds for report in reports)
        total = sum(report.bytes_moved for report in reports)
        return MovingFigures(
            rebalances=len(reports),
            slots_moved=sum(report.slots_moved for report in reports),
            bytes_moved=total,
            layers=sum(report.layers for report in reports),
            seconds=round(seconds, 3),
            mb_per_s=round(total / seconds / 1e6, 3),
            seconds_each=round(float(np.median([report.seconds for report in reports])), 4),
            steps_each=round(float(np.median([steps for _, steps in self._carried]))),
        )


def _eplb(status: EngineStatus) -> EplbStatus:
    if status.eplb is None:
        raise DrumlineError("the engine does not balance its experts: enable_eplb is off")
    return status.eplb
