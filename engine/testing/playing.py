"""A scenario on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from drumline.engine.testing.records import InjectedFault, InjectionFailed
from drumline.engine.testing.scenario import MESSAGE_KINDS, Scenario, ScheduledFault

if TYPE_CHECKING:
    from drumline.engine.testing.faulty_engine import FaultyEngine

OnDone = Callable[[ScheduledFault, InjectedFault | InjectionFailed], None]


async def play(faulty: FaultyEngine, scenario: Scenario, on_done: OnDone | None = None) -> list[InjectedFault]:
    """See :meth:`FaultyEngine.play`. With ``on_done``, which is called with each fault and what came of it, one that
    was not seen raises nothing."""
    start = asyncio.get_running_loop().time()
    seen: list[InjectedFault] = []
    failed: list[InjectionFailed] = []

    async def one(number: int, fault: ScheduledFault) -> None:
        await asyncio.sleep(start + fault.at_s - asyncio.get_running_loop().time())
        result: InjectedFault | InjectionFailed
        try:
            result = await bring_about(faulty, fault, scenario.seed + number)
        except InjectionFailed as error:
            failed.append(error)
            result = error
        else:
            seen.append(result)
        if on_done is not None:
            on_done(fault, result)

    async with asyncio.TaskGroup() as tasks:
        for number, fault in enumerate(scenario.faults):
            tasks.create_task(one(number, fault))
    if failed and on_done is None:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InjectionFailed(f"scenario {scenario.name!r}: {failed[0].text}{more}") from failed[0]
    return seen


async def bring_about(faulty: FaultyEngine, fault: ScheduledFault, seed: int = 0) -> InjectedFault:
    """One fault, now. Returns when it has been seen; of a full disk when it has room again."""
    kind, rank = fault.kind, fault.rank
    if kind in MESSAGE_KINDS:
        return await _messages(faulty, fault, seed)
    if kind == "partition":
        return await faulty.partition((rank,), fault.seconds)
    if kind == "coordinator":
        return await faulty.kill_coordinator()
    if kind == "stopped_coordinator":
        return await faulty.pause_coordinator(fault.seconds)
    if kind == "forkserver":
        return await faulty.kill_forkserver()
    if kind == "planner":
        return await faulty.kill_planner()
    if kind == "full_disk":
        seen = await faulty.fill_journal_disk()
        await asyncio.sleep(fault.seconds)
        await faulty.free_journal_disk()
        return seen
    return await _rank(faulty, fault)


async def _rank(faulty: FaultyEngine, fault: ScheduledFault) -> InjectedFault:
    kind, rank = fault.kind, fault.rank
    now = fault.point == "now" and fault.step < 0
    where: int | str = fault.step if fault.step >= 0 else fault.point
    if kind == "kill":
        return await faulty.kill(rank, None if now else where)
    if kind == "stop":
        return await faulty.pause(rank, fault.seconds, None if now else where)
    if kind == "slow":
        return await faulty.slow(rank, fault.factor, fault.seconds, where)
    if kind == "exit":
        return await faulty.exit(rank, where)
    if kind == "segv":
        return await faulty.segfault(rank, where)
    if kind == "hang":
        return await faulty.hang(rank, where)
    step = fault.step if fault.step >= 0 else None
    return await (faulty.crash_in_step(rank, step) if kind == "raise" else faulty.nan_logits(rank, step))


async def _messages(faulty: FaultyEngine, fault: ScheduledFault, seed: int) -> InjectedFault:
    ranks = (fault.rank,) if fault.rank >= 0 else ()
    if fault.kind == "delay":
        return await faulty.delay(
            fault.seconds,
            fault.messages,
            ranks,
            direction=fault.direction,
            probability=fault.probability,
            seed=seed,
            times=fault.times,
        )
    act = {"drop": faulty.drop, "duplicate": faulty.duplicate, "corrupt": faulty.corrupt}[fault.kind]
    return await act(
        fault.messages,
        ranks,
        direction=fault.direction,
        probability=fault.probability,
        seed=seed,
        lasting_s=fault.seconds,
        times=fault.times,
    )
