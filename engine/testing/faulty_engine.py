"""A real engine, and everything that can be done to it on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, FaultConfig
from drumline.engine.testing import engine_faults, rank_faults
from drumline.engine.testing.injector import Injector
from drumline.engine.testing.playing import play
from drumline.engine.testing.records import InjectedFault
from drumline.engine.testing.scenario import Scenario
from drumline.protocol.messages import Event, MessageFault

RESTART_LIMIT = 1000


class FaultyEngine:
    """An engine that lives as long as this object is open, and fails on demand::

        async with FaultyEngine(EngineConfig(model="demo", parallel=ParallelConfig(data_parallel_size=2))) as faulty:
            stream = asyncio.create_task(read(faulty.engine.generate("Once upon", params)))
            await faulty.kill(1, at="decode")
            await stream

    ``config`` is taken with ``fault_injection=True``; with ``faults`` at its defaults ranks may be started again as
    often as they are killed. Every method returns what was seen to happen, once it has been seen, and adds it to
    ``injected``; it raises :class:`~drumline.engine.testing.InjectionFailed` when that is not within ``timeout_s``
    seconds, for a rank that does not exist or a point that is never reached too. ``at``: None is now, by signal; the
    number of a step, or a point ("loading", "leave", "regroup", "joining", "idle", "step", "prefill", "decode",
    "staging", "commit"), has the rank do it to itself at the first time that it comes there. ``on_event`` is called
    with every event.
    """

    def __init__(
        self, config: EngineConfig, *, on_event: Callable[[Event], None] | None = None, timeout_s: float = 30.0
    ) -> None:
        faults = config.faults
        if faults == FaultConfig():
            faults = msgspec.structs.replace(faults, restart_limit=RESTART_LIMIT)
        self._on_event = on_event
        self.engine = AsyncEngine(
            msgspec.structs.replace(config, fault_injection=True, faults=faults), on_event=self._event
        )
        self._injector = Injector(self.engine, timeout_s)
        self.is_open = False

    async def __aenter__(self) -> FaultyEngine:
        await self.engine.start()
        self.is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Wakes whoever sleeps and ends the engine. Idempotent."""
        self.is_open = False
        try:
            await self._injector.close()
        finally:
            await self.engine.close()

    def abandon(self) -> None:
        """For an engine whose event loop is gone, so that nobody can close it: kills all that it owns and lets go of
        its socket, which would hold up the end of this process."""
        self.is_open = False
        if self.supervisor_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.supervisor_pid, signal.SIGKILL)
        if self.engine._connection is not None:
            self.engine._connection._socket._context.destroy(linger=0)

    def _event(self, event: Event) -> None:
        self._injector.take(event)
        if self._on_event is not None:
            self._on_event(event)

    @property
    def supervisor_pid(self) -> int:
        """The process that owns all others of the engine; 0 before it is started."""
        local = self.engine._local
        return local.supervisor_pid if local is not None else 0

    @property
    def injected(self) -> list[InjectedFault]:
        """What was seen to happen, oldest first."""
        return self._injector.injected

    @property
    def events(self) -> list[Event]:
        """The last 4,096 events of the engine, oldest first."""
        return list(self._injector.events.seen)

    # -- ranks

    async def kill(self, rank: int, at: int | str | None = None) -> InjectedFault:
        """SIGKILL. Its process is gone."""
        return await rank_faults.kill(self._injector, rank, at)

    async def exit(self, rank: int, at: int | str = "step") -> InjectedFault:
        """The rank ends with status 1."""
        return await rank_faults.end_itself(self._injector, "exit", rank, at)

    async def segfault(self, rank: int, at: int | str = "step") -> InjectedFault:
        """The rank ends by SIGSEGV."""
        return await rank_faults.end_itself(self._injector, "segv", rank, at)

    async def pause(self, rank: int, seconds: float, at: int | str | None = None) -> InjectedFault:
        """SIGSTOP for ``seconds``. All its threads stand still; what is left of it then is woken in the background."""
        return await rank_faults.pause(self._injector, rank, seconds, at)

    async def slow(self, rank: int, factor: float, seconds: float = 0.0, at: int | str | None = None) -> InjectedFault:
        """Steps of the rank take ``factor`` times as long, for ``seconds`` or (0.0) for good."""
        point = "now" if at is None else at
        return await rank_faults.go_on_badly(self._injector, "slow", rank, point, seconds, factor)

    async def hang(self, rank: int, at: int | str | None = None) -> InjectedFault:
        """The rank's main thread hangs for good, with ``at`` None in its next step; its control thread answers."""
        return await rank_faults.go_on_badly(self._injector, "hang", rank, "step" if at is None else at)

    async def crash_in_step(self, rank: int, step: int | None = None) -> InjectedFault:
        """The rank raises an exception in its next step, or from ``step`` on; the engine has told so."""
        return await rank_faults.fail_in_step(self._injector, "raise", rank, "step" if step is None else step)

    async def nan_logits(self, rank: int, step: int | None = None) -> InjectedFault:
        """The logits of the first row are NaN in the rank's next step, or from ``step`` on; the engine has told so. The
        rank must be one that samples: the first of an attention replica, in its last stage."""
        return await rank_faults.fail_in_step(self._injector, "nan", rank, "step" if step is None else step)

    # -- messages between the coordinator and ranks

    async def drop(
        self,
        messages: Sequence[str] = (),
        ranks: Sequence[int] = (),
        *,
        direction: str = "both",
        probability: float = 1.0,
        seed: int = 0,
        lasting_s: float = 0.0,
        times: int = 0,
    ) -> InjectedFault:
        """Messages are lost, from now on: those with these names (none: all) from and to these ranks (none: all).

        ``direction``: to_worker, from_worker or both; for ``lasting_s`` seconds (0.0: until the end) and at most
        ``times`` messages (0: any number). Returns once one has been lost.
        """
        names, some = tuple(messages), tuple(ranks)
        fault = MessageFault("drop", direction, names, some, probability, seed, 0.0, lasting_s, times)
        return await engine_faults.messages(self._injector, fault)

    async def delay(
        self,
        by_s: float,
        messages: Sequence[str] = (),
        ranks: Sequence[int] = (),
        *,
        direction: str = "both",
        probability: float = 1.0,
        seed: int = 0,
        lasting_s: float = 0.0,
        times: int = 0,
    ) -> InjectedFault:
        """Messages come ``by_s`` seconds later, and so perhaps after others. See :meth:`drop`."""
        names, some = tuple(messages), tuple(ranks)
        fault = MessageFault("delay", direction, names, some, probability, seed, by_s, lasting_s, times)
        return await engine_faults.messages(self._injector, fault)

    async def duplicate(
        self,
        messages: Sequence[str] = (),
        ranks: Sequence[int] = (),
        *,
        direction: str = "both",
        probability: float = 1.0,
        seed: int = 0,
        lasting_s: float = 0.0,
        times: int = 0,
    ) -> InjectedFault:
        """Messages come twice. See :meth:`drop`."""
        names, some = tuple(messages), tuple(ranks)
        fault = MessageFault("duplicate", direction, names, some, probability, seed, 0.0, lasting_s, times)
        return await engine_faults.messages(self._injector, fault)

    async def corrupt(
        self,
        messages: Sequence[str] = (),
        ranks: Sequence[int] = (),
        *,
        direction: str = "both",
        probability: float = 1.0,
        seed: int = 0,
        lasting_s: float = 0.0,
        times: int = 0,
    ) -> InjectedFault:
        """Messages do not decode where they arrive, and are counted as malformed there. See :meth:`drop`."""
        names, some = tuple(messages), tuple(ranks)
        fault = MessageFault("corrupt", direction, names, some, probability, seed, 0.0, lasting_s, times)
        return await engine_faults.messages(self._injector, fault)

    async def partition(self, ranks: Sequence[int], seconds: float) -> InjectedFault:
        """Nothing passes between the coordinator and ``ranks`` for ``seconds``; they still reach one another."""
        fault = MessageFault("drop", ranks=tuple(ranks), lasting_s=seconds)
        return await engine_faults.messages(self._injector, fault, "partition")

    # -- the rest of the engine

    async def kill_coordinator(self) -> InjectedFault:
        """SIGKILL. Another coordinator, of a higher term, has answered."""
        return await engine_faults.kill_coordinator(self._injector)

    async def pause_coordinator(self, seconds: float) -> InjectedFault:
        """SIGSTOP for ``seconds``. All its threads stand still."""
        return await engine_faults.pause_coordinator(self._injector, seconds)

    async def kill_forkserver(self) -> InjectedFault:
        """SIGKILL of the process that starts the ranks."""
        return await engine_faults.kill_forkserver(self._injector)

    async def kill_planner(self) -> InjectedFault:
        """SIGKILL of the process that plans placements of experts, once there is one."""
        return await engine_faults.kill_planner(self._injector)

    async def fill_journal_disk(self) -> InjectedFault:
        """A real SQLITE_FULL: the journal may not grow. It is degraded."""
        return await engine_faults.fill_disk(self._injector)

    async def free_journal_disk(self) -> None:
        """There is room again. The journal has caught up and is on."""
        await engine_faults.free_disk(self._injector)

    # -- scenarios

    async def play(self, scenario: Scenario) -> list[InjectedFault]:
        """Everything in ``scenario``, each at its time; returns what was seen to happen, once all has. Raises
        InjectionFailed for the first fault that was not seen, after all have been tried."""
        return await play(self, scenario)

    async def until_whole(self, seconds: float = 60.0) -> float:
        """Wait until every rank is ready again; returns how long that took."""
        start = asyncio.get_running_loop().time()
        await self._injector.until(
            lambda status: status.state == "ready" and all(rank.state == "ready" for rank in status.ranks),
            "the engine is not whole again",
            seconds,
        )
        return asyncio.get_running_loop().time() - start
