"""Faults of what is not a rank: the coordinator, messages, the journal's disk, what starts the ranks."""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.census import role_of
from drumline.engine.testing.injector import LOOK_S, Injector, with_process
from drumline.engine.testing.processes import Process, family
from drumline.engine.testing.records import InjectedFault, InjectionFailed
from drumline.protocol.errors import DrumlineError
from drumline.protocol.messages import MessageFault
from drumline.protocol.status import EngineStatus


async def messages(injector: Injector, fault: MessageFault, kind: str = "") -> InjectedFault:
    """Something happens to messages from now on, under a number of its own; returns once it has happened to one.
    ``kind``: how it is recorded."""
    kind = kind or fault.kind
    fault = msgspec.structs.replace(fault, number=injector.orders.next_number())
    status = await injector.status()
    ranks = {one.rank for one in status.ranks}
    for rank in fault.ranks:
        if rank not in ranks:
            raise InjectionFailed(f"rank {rank} does not exist; the engine has ranks 0 to {max(ranks)}")
    counter = f"messages_fault_{fault.number}"
    await injector.orders.send(messages=(fault,))
    about = ", ".join(fault.messages) or "messages"
    what = f"{kind}: no {about} ({fault.direction}) of ranks {list(fault.ranks) or 'any'} came by"
    after = await injector.until(lambda one: one.counters.get(counter, 0) > 0, what)
    damaged = after.counters["worker_frames_malformed"] - status.counters["worker_frames_malformed"]
    if kind == "corrupt" and fault.direction == "from_worker" and damaged < 1:
        raise InjectionFailed("corrupt: the coordinator counts no malformed frame")
    rank = fault.ranks[0] if len(fault.ranks) == 1 else -1
    return injector.note(kind, f"{after.counters[counter]} messages by now", rank=rank)


async def kill_coordinator(injector: Injector) -> InjectedFault:
    """SIGKILL; returns when another one with a higher term answers."""
    before = await injector.status()
    process = _coordinator(injector, before)
    await with_process(process, process.kill())

    def replaced(status: EngineStatus) -> bool:
        return status.term > before.term and status.coordinator.pid != process.pid

    after = await injector.until(replaced, f"no coordinator took over from {process.what}")
    text = f"term {after.term}, pid {after.coordinator.pid} after term {before.term}"
    return injector.note("coordinator", text, pid=process.pid)


async def pause_coordinator(injector: Injector, seconds: float) -> InjectedFault:
    """SIGSTOP, and SIGCONT after ``seconds``."""
    process = _coordinator(injector, await injector.status())
    await injector.stop(process, process.stop(), seconds)
    return injector.note("stopped_coordinator", "all its threads are in state T", pid=process.pid)


def _coordinator(injector: Injector, status: EngineStatus) -> Process:
    if injector.engine.config.inline:
        raise InjectionFailed("the coordinator runs in this process (inline=True): it cannot be killed or stopped")
    return Process(status.coordinator.pid, "the coordinator")


async def kill_forkserver(injector: Injector) -> InjectedFault:
    """SIGKILL of the process that starts the ranks."""
    supervisor = (await injector.status()).supervisor.pid
    found = [pid for pid in family(supervisor) if role_of(pid) == "forkserver"]
    if not found:
        raise InjectionFailed(f"the supervisor (pid {supervisor}) has started no forkserver")
    process = Process(found[0], "the forkserver")
    await with_process(process, process.kill())
    return injector.note("forkserver", "its process has ended", pid=process.pid)


async def kill_planner(injector: Injector) -> InjectedFault:
    """SIGKILL of the process that plans placements of experts, once there is one."""
    supervisor = (await injector.status()).supervisor.pid
    deadline = time.monotonic() + injector.timeout_s
    while not (found := _planners(supervisor, injector.engine.config.inline)):
        if time.monotonic() > deadline:
            text = f"no planner was seen within {injector.timeout_s:g} s: it is started for the first plan"
            raise InjectionFailed(text)
        await asyncio.sleep(LOOK_S)
    process = Process(found[0], "the planner")
    await with_process(process, process.kill())
    return injector.note("planner", "its process has ended", pid=process.pid)


def _planners(supervisor: int, inline: bool) -> list[int]:
    """The coordinator starts it, which may be this process."""
    pids = {*family(supervisor), *(family(os.getpid()) if inline else ())}
    return [pid for pid in sorted(pids) if role_of(pid) == "planner"]


async def fill_disk(injector: Injector) -> InjectedFault:
    """The journal may not have another page; returns when it has noticed, to which end one token is asked for."""
    if (await injector.status()).journal == "off":
        raise InjectionFailed("the engine keeps no journal, whose disk could be full")
    await injector.orders.send(full_disk=1)
    await _one_token(injector)
    await injector.until(lambda one: one.journal == "degraded", "the journal did not notice that its disk is full")
    return injector.note("full_disk", "the journal is degraded")


async def free_disk(injector: Injector) -> None:
    """There is room again; returns when the journal has caught up."""
    await injector.orders.send(full_disk=0)
    await injector.until(lambda one: one.journal == "on", "the journal did not recover")


async def _one_token(injector: Injector) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    try:
        async for _ in injector.engine.generate([1], params):
            pass
    except DrumlineError as error:
        raise InjectionFailed(f"full_disk: the token that was asked for did not come: {error}") from error
