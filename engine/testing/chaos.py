"""A real engine under load and a random scenario, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from drumline.engine.config import EngineConfig
from drumline.engine.testing.census import Census, take_census
from drumline.engine.testing.faulty_engine import FaultyEngine
from drumline.engine.testing.load import Load, make_requests
from drumline.engine.testing.playing import play
from drumline.engine.testing.records import InjectedFault, InjectionFailed
from drumline.engine.testing.recovery import Recoveries, Spread
from drumline.engine.testing.scenario import Chances, Scenario, ScheduledFault, random_scenario
from drumline.engine.testing.shuffling import Shuffling
from drumline.protocol.messages import Event

WARM_S = 2.0
"""How long the load runs before the first census."""
LATE_FAULTS_S = 10.0
"""How long faults may still come after the end of the scenario."""
END_S = 120.0
"""How long the last requests and the last replacement may take."""
INTERRUPTING = frozenset(
    ("kill", "stop", "exit", "segv", "raise", "nan", "hang", "partition", "coordinator", "stopped_coordinator")
)


class ChaosPlan(msgspec.Struct, frozen=True):
    """``every_s``: the mean time between faults. ``streams`` are kept running, half of them greedy, with requests of up
    to ``max_tokens``."""

    seconds: float
    seed: int = 0
    every_s: float = 3.0
    streams: int = 32
    max_tokens: int = 128

    def chances(self, experts_move: bool = False) -> Chances:
        """How its faults are drawn."""
        return Chances(every_s=self.every_s, experts_move=experts_move)


class FaultCount(msgspec.Struct):
    """``not_seen``: ordered, but the rank never came to the point, or had gone already."""

    happened: int = 0
    not_seen: int = 0


class ChaosReport(msgspec.Struct, kw_only=True):
    """``seconds``: how long faults went on. ``recovery``: from a fault to the token that ended a stream's longest
    silence after it, by kind of fault. ``regroup``: how long groups stood still after faults, ``join`` when a
    replacement came, as the engine itself tells. ``rebalances``: by outcome, where experts were moved all the time.
    ``at_start`` and ``at_end``: with load, and after it."""

    model: str
    ranks: int
    seed: int
    seconds: float
    streams: int
    requests: int
    tokens: int
    lost: int
    duplicated: int
    wrong: int
    ties: int
    faults: dict[str, FaultCount]
    recovery: dict[str, Spread]
    regroup: Spread
    join: Spread
    events: dict[str, int]
    at_start: Census
    at_end: Census
    state_at_end: str
    journal_at_end: str
    failures: list[str]
    not_seen: list[str]
    rebalances: dict[str, int] = {}

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, repeated or wrong, and the engine is whole at the end."""
        return not (self.lost or self.duplicated or self.wrong) and self.state_at_end == "ready"


class Chaos:
    """One run. ``on_progress`` is called several times a second with this object."""

    def __init__(self, config: EngineConfig, plan: ChaosPlan, on_event: Callable[[Event], None] | None = None) -> None:
        self.plan = plan
        self.config = config
        self.faults: dict[str, FaultCount] = {}
        self.not_seen: list[str] = []
        self.recoveries = Recoveries(plan.streams)
        self.events: Counter[str] = Counter()
        self.load: Load | None = None
        self.shuffling: Shuffling | None = None
        self.started_at = 0.0
        self.last = ""
        self._on_event = on_event
        self._regroups: list[float] = []
        self._joins: list[float] = []

    def _event(self, event: Event) -> None:
        self.events[event.kind] += 1
        if event.kind == "recovered":
            self._regroups.append(event.seconds)
        elif event.kind == "joined":
            self._joins.append(event.seconds)
        if self._on_event is not None:
            self._on_event(event)

    def _done(self, fault: ScheduledFault, result: InjectedFault | InjectionFailed) -> None:
        count = self.faults.setdefault(fault.kind, FaultCount())
        where = f" of rank {fault.rank}" if fault.rank >= 0 else ""
        self.last = f"{fault.kind}{where} at {fault.point}"
        if isinstance(result, InjectedFault):
            count.happened += 1
            if fault.kind in INTERRUPTING:
                self.recoveries.fault(fault.kind, result.at)
        else:
            count.not_seen += 1
            self.not_seen.append(f"{self.last}: {result.text}")
            del self.not_seen[:-50]

    async def run(self, ready: Callable[[], None] | None = None) -> ChaosReport:
        """Start the engine, learn what is right, then let faults happen. ``ready`` is called when it is up."""
        async with FaultyEngine(self.config, on_event=self._event, timeout_s=20.0) as faulty:
            if ready is not None:
                ready()
            asked = make_requests(faulty.engine, self.plan.streams, self.plan.max_tokens, self.plan.seed)
            load = self.load = Load(faulty.engine, asked, self.recoveries.token)
            await load.learn()
            running = asyncio.create_task(load.run())
            tasks = [running]
            try:
                if self.config.parallel.enable_eplb:
                    self.shuffling = await Shuffling.of(faulty.engine)
                    tasks.append(asyncio.create_task(self.shuffling.on_and_on()))
                return await self._under(faulty, load, running)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _under(self, faulty: FaultyEngine, load: Load, running: asyncio.Task[None]) -> ChaosReport:
        await asyncio.sleep(WARM_S)
        status = await faulty.engine.status()
        supervisor = status.supervisor.pid
        at_start = await asyncio.to_thread(take_census, supervisor)
        chances = self.plan.chances(experts_move=self.shuffling is not None)
        scenario = random_scenario(self.plan.seed, len(status.ranks), self.plan.seconds, chances)
        self.started_at = time.monotonic()
        await self._play(faulty, scenario, running)
        seconds = time.monotonic() - self.started_at
        load.finish()
        await asyncio.wait([running], timeout=END_S)
        if running.done():
            running.result()  # a load that has died has not looked at all that came
            state = await self._whole(faulty)
        else:
            state = "requests do not end"
            load.tally.lost += 1
            load.tally.fail(f"requests run on {END_S:g} s after the last fault")
        end = await self._status(faulty)
        return ChaosReport(
            model=self.config.served_model_name or self.config.model,
            ranks=len(status.ranks),
            seed=self.plan.seed,
            seconds=seconds,
            streams=self.plan.streams,
            requests=load.tally.requests,
            tokens=load.tally.tokens,
            lost=load.tally.lost,
            duplicated=load.tally.duplicated,
            wrong=load.tally.wrong,
            ties=load.tally.ties,
            faults=dict(sorted(self.faults.items())),
            recovery=self.recoveries.spreads(),
            regroup=Spread.of(self._regroups),
            join=Spread.of(self._joins),
            events=dict(sorted(self.events.items())),
            at_start=at_start,
            at_end=await asyncio.to_thread(take_census, supervisor),
            state_at_end=state,
            journal_at_end=end,
            failures=load.tally.failures,
            not_seen=self.not_seen,
            rebalances=dict(self.shuffling.outcomes) if self.shuffling is not None else {},
        )

    async def _play(self, faulty: FaultyEngine, scenario: Scenario, running: asyncio.Task[None]) -> None:
        """Until the scenario is over, or the engine has ended and every request fails."""
        playing = asyncio.create_task(play(faulty, scenario, self._done))
        try:
            await asyncio.wait([running], timeout=self.plan.seconds)
            await asyncio.wait([playing], timeout=LATE_FAULTS_S)
        finally:
            # A fault whose point was not reached by now is none.
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
        if not playing.cancelled():
            playing.result()  # a scenario that has died has not brought about the rest

    async def _whole(self, faulty: FaultyEngine) -> str:
        try:
            await faulty.until_whole(END_S)
        except InjectionFailed as error:
            return error.text
        return "ready"

    async def _status(self, faulty: FaultyEngine) -> str:
        try:
            return (await faulty.engine.status()).journal
        except Exception as error:
            return f"unknown: {error}"
