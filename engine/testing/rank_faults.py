"""Faults of ranks: by signal from here, or by the rank itself when it comes to a point."""

from __future__ import annotations

from drumline.engine.testing.injector import Injector, check_point, with_process
from drumline.engine.testing.processes import GONE_S, Process
from drumline.engine.testing.records import InjectedFault, InjectionFailed
from drumline.engine.testing.scenario import POINTS
from drumline.protocol.messages import Injection

TOLD_S = 10.0
"""Within which the engine must have noticed what a rank did to itself."""


async def kill(injector: Injector, rank: int, at: int | str | None) -> InjectedFault:
    """SIGKILL."""
    if at is not None:
        return await end_itself(injector, "kill", rank, at)
    process, _ = await injector.process(rank)
    await with_process(process, process.kill())
    return injector.note("kill", "its process has ended", rank=rank, pid=process.pid)


async def end_itself(injector: Injector, kind: str, rank: int, at: int | str) -> InjectedFault:
    """The rank ends its own process: kill, exit or segv."""
    pid, incarnation, point, step = await _itself(injector, kind, rank, at)
    fault = await injector.lost(rank, incarnation, TOLD_S)
    return injector.note(kind, fault or "it is lost", rank=rank, pid=pid, point=point, step=step)


async def pause(injector: Injector, rank: int, seconds: float, at: int | str | None) -> InjectedFault:
    """SIGSTOP, and SIGCONT after ``seconds``."""
    if at is None:
        process, _ = await injector.process(rank)
        await injector.stop(process, process.stop(), seconds)
        return injector.note("stop", "all its threads are in state T", rank=rank, pid=process.pid)
    pid, _, point, step = await _itself(injector, "stop", rank, at)
    if not pid:
        raise InjectionFailed(f"rank {rank} stopped itself at {point!r}, but the status has lost its pid")
    process = Process(pid, f"rank {rank}")
    await injector.stop(process, process.until(lambda: process.state == "T", GONE_S, "did not stop"), seconds)
    return injector.note("stop", "all its threads are in state T", rank=rank, pid=pid, point=point, step=step)


async def fail_in_step(injector: Injector, kind: str, rank: int, at: int | str) -> InjectedFault:
    """The rank raises in a step, or its logits are not finite: the epoch ends, the process stays."""
    wanted = {"raise": "exception", "nan": "numeric"}[kind]
    before = injector.events.count
    pid, _, point, step = await _itself(injector, kind, rank, at)
    event = await injector.events.since(
        before,
        lambda one: one.kind == "fault" and one.rank == rank and one.fault == wanted,
        TOLD_S,
        f"no fault {wanted!r} of rank {rank} was told",
    )
    return injector.note(kind, event.text, rank=rank, pid=pid, point=point, step=step)


async def go_on_badly(
    injector: Injector, kind: str, rank: int, at: int | str, seconds: float = 0.0, factor: float = 1.0
) -> InjectedFault:
    """The rank hangs, or is slow from now on."""
    pid, _, point, step = await _itself(injector, kind, rank, at, seconds, factor)
    return injector.note(kind, "the rank says so", rank=rank, pid=pid, point=point, step=step)


async def _itself(
    injector: Injector, kind: str, rank: int, at: int | str, seconds: float = 0.0, factor: float = 1.0
) -> tuple[int, str, str, int]:
    """Have it happen; returns the pid (0 if it is not known any more), the incarnation, the point and the step."""
    point, step = check_point(at, POINTS)
    await injector.rank(rank)
    number = injector.orders.next_number()
    event = await injector.orders.injected(Injection(number, rank, kind, point, step, seconds, factor))
    found = await injector.rank(rank)
    return found.pid if found.incarnation == event.incarnation else 0, event.incarnation, point, step
