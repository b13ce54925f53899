"""What every kind of fault needs: the engine's status, its processes, and a record of what was seen to happen."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

from drumline.engine.client import AsyncEngine
from drumline.engine.testing.orders import Events, Orders
from drumline.engine.testing.processes import Process, name
from drumline.engine.testing.records import InjectedFault, InjectionFailed
from drumline.protocol.errors import DrumlineError, InvalidRequest
from drumline.protocol.messages import Event
from drumline.protocol.status import EngineStatus, RankStatus

LOOK_S = 0.02
LOST = ("dead", "wedged")


class Injector:
    """The engine under test. ``injected``: what was seen to happen, in that order. ``timeout_s``: how long a fault may
    take to happen."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self.engine = engine
        self.timeout_s = timeout_s
        self.events = Events()
        self.orders = Orders(engine, self.events, timeout_s)
        self.injected: list[InjectedFault] = []
        self._stopped: dict[Process, asyncio.Task[None]] = {}
        self._repeats: set[asyncio.Task[None]] = set()

    def take(self, event: Event) -> None:
        """An event of the engine. After a change of coordinators what has not happened is ordered again."""
        self.events.add(event)
        if event.kind == "term":
            task = asyncio.get_running_loop().create_task(self.orders.repeat())
            self._repeats.add(task)
            task.add_done_callback(self._repeated)

    def _repeated(self, task: asyncio.Task[None]) -> None:
        self._repeats.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for the fault says what did not happen

    def note(self, kind: str, evidence: str, **more: int | str) -> InjectedFault:
        """Record a fault that has been seen to happen now."""
        fault = InjectedFault(kind=kind, evidence=evidence, at=time.monotonic(), **more)  # type: ignore[arg-type]
        self.injected.append(fault)
        return fault

    # -------------------------------------------------------------------------------------------------- the engine

    async def status(self) -> EngineStatus:
        """The engine's; waits for a coordinator that has just been replaced."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                return await self.engine.status()
            except DrumlineError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise InjectionFailed(f"the engine's status cannot be read: {error.text}") from error
            await asyncio.sleep(LOOK_S)

    async def until(
        self, condition: Callable[[EngineStatus], bool], what: str, seconds: float | None = None
    ) -> EngineStatus:
        """The first status that fulfils ``condition``. Raises InjectionFailed, saying ``what``, when none does."""
        limit = self.timeout_s if seconds is None else seconds
        deadline = time.monotonic() + limit
        while True:
            status = await self.status()
            if condition(status):
                return status
            if time.monotonic() > deadline:
                raise InjectionFailed(f"{what} within {limit:g} s")
            await asyncio.sleep(LOOK_S)

    async def rank(self, rank: int) -> RankStatus:
        """What the status says of ``rank``. Raises InjectionFailed for one that does not exist."""
        return _of(await self.status(), rank)

    async def process(self, rank: int) -> tuple[Process, str]:
        """The living process of ``rank``, waiting for its replacement if it is dead, and its incarnation."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            found = await self.rank(rank)
            if found.host not in ("", socket.gethostname()):
                raise InjectionFailed(f"rank {rank} runs on {found.host}: only processes of this machine are signalled")
            process = _living(found)
            if process is not None:
                return process, found.incarnation
            if time.monotonic() > deadline:
                text = f"rank {rank} is {found.state} (pid {found.pid}): no living process of it was seen"
                raise InjectionFailed(f"{text} within {self.timeout_s:g} s")
            await asyncio.sleep(LOOK_S)

    async def lost(self, rank: int, incarnation: str, seconds: float) -> str:
        """Wait until the engine knows that a process of ``rank`` is lost; returns what it says of it."""

        def known(status: EngineStatus) -> bool:
            one = _of(status, rank)
            return one.state in LOST or one.incarnation != incarnation

        what = f"rank {rank} ({incarnation[:8]}) was not found to be lost"
        return _of(await self.until(known, what, seconds), rank).last_fault

    # ---------------------------------------------------------------------------------------------- stopped processes

    async def stop(self, process: Process, stopping: Awaitable[None], seconds: float) -> None:
        """Do ``stopping``, after which the process stands still, and wake it after ``seconds`` if it is still there.
        One that is not seen to stop is woken and let go of at once."""
        try:
            await stopping
        except BaseException:
            process.wake()
            process.close()
            raise

        async def wake() -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                process.wake()
                process.close()
                self._stopped.pop(process, None)

        self._stopped[process] = asyncio.get_running_loop().create_task(wake())

    async def close(self) -> None:
        """Wake whoever still sleeps."""
        tasks = [*self._stopped.values(), *self._repeats]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in list(self._stopped):  # cancelled before it began
            process.wake()
            process.close()
        self._stopped.clear()


async def with_process(process: Process, work: Awaitable[None]) -> None:
    """Do ``work``, then let go of ``process``."""
    try:
        await work
    finally:
        process.close()


def check_point(at: int | str | None, points: tuple[str, ...]) -> tuple[str, int]:
    """The point and step that ``at`` means: the name of a point, or a step's number."""
    if isinstance(at, int) and not isinstance(at, bool) and at >= 0:
        return "step", at
    if isinstance(at, str) and at in points:
        return at, -1
    raise InvalidRequest("at", at, f"None, the number of a step, or one of {', '.join(points)}")


def _of(status: EngineStatus, rank: int) -> RankStatus:
    for one in status.ranks:
        if one.rank == rank:
            return one
    raise InjectionFailed(f"rank {rank} does not exist; the engine has ranks 0 to {len(status.ranks) - 1}")


def _living(rank: RankStatus) -> Process | None:
    if rank.pid <= 0 or rank.state in LOST:
        return None
    try:
        process = Process(rank.pid, f"rank {rank.rank}")
    except InjectionFailed:
        return None
    if process.gone or not name(rank.pid).startswith(f"drumline:r{rank.rank}"):
        process.close()
        return None
    return process
