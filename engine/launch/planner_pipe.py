"""The coordinator's end of one planner process: requests down its stdin, plans up its stdout."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from drumline.engine.core.balance.plan import PlacementPlan
from drumline.engine.launch.owned_process import OwnedProcess, how_ended
from drumline.engine.planner_frames import FrameReader, plans
from drumline.protocol.errors import ProtocolError


class PlannerPipe:
    """One planner process. ``on_plan`` gets what it answers. ``on_lost(text)`` is called once, when it has ended or has
    been killed, because what it said was no plan; nothing is called after that, or after :meth:`drop`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        module: str,
        on_plan: Callable[[PlacementPlan], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._on_plan = on_plan
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._over = False
        self._process = OwnedProcess(loop, module, [str(os.getpid())], on_output=self._output, on_exit=self._ended)
        self.pid = self._process.pid

    def send(self, frame: bytes) -> None:
        """Send a request."""
        self._process.send(frame)

    def drop(self) -> None:
        """Kill it; whatever it has said or will say is not heard."""
        self._over = True
        self._process.signal(signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        """Whether it has ended and been waited for."""
        return self._process.exited.is_set()

    async def ended(self, timeout: float) -> bool:
        """Whether it ends within ``timeout`` seconds."""
        return await self._process.wait(timeout)

    def _output(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data) if not self._over else ():
                plan = plans.decode([frame])
                if not self._over:
                    self._on_plan(plan)
        except ProtocolError as error:
            self._lose(f"what the planner (pid {self.pid}) said is no plan: {error.text}")

    def _ended(self, code: int, number: int) -> None:
        if not self._over:
            self._lose(f"the planner (pid {self.pid}) ended with {how_ended(code, number)}")

    def _lose(self, text: str) -> None:
        self.drop()
        self._on_lost(text)
