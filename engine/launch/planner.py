"""Placement plans from a process of their own, so that a solve takes no time from the steps."""

from __future__ import annotations

import asyncio
import logging

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.launch.planner_pipe import PlannerPipe
from drumline.engine.planner_frames import no_plan, pack_request
from drumline.protocol.errors import ProtocolError

log = logging.getLogger(__name__)

MODULE = "drumline.engine.planner_main"
MAX_ASKED = 8
"""Requests that are solved or wait; one more is refused."""
CLOSE_S = 2.0


class PlanLost(Exception):
    """There will be no answer to the request that is out."""


class Planner:
    """Starts its process at the first request, and another one after the last has ended. One solve at a time.

    Belongs to one event loop, whose thread must outlive it: the process ends with that. ``deadline_s``: how long a
    request may take, its wait for others included. ``module``: what the process runs.
    """

    def __init__(self, deadline_s: float = 60.0, module: str = MODULE) -> None:
        self._deadline_s = deadline_s
        self._module = module
        self._turn = asyncio.Lock()
        self._asked = 0
        self._pipe: PlannerPipe | None = None
        self._dropped: list[PlannerPipe] = []
        self._answer: asyncio.Future[PlacementPlan] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of its process, None while there is none."""
        return None if self._pipe is None else self._pipe.pid

    async def plan(self, request: PlanRequest) -> PlacementPlan:
        """The plan for ``request``. Never raises but when cancelled: trouble is a plan with ``error``."""
        if self._asked >= MAX_ASKED:
            return no_plan(request, f"{self._asked} requests wait for the planner already")
        self._asked += 1
        try:
            async with asyncio.timeout(self._deadline_s), self._turn:
                return await self._solve(request)
        except TimeoutError:
            return no_plan(request, f"the planner took longer than {self._deadline_s:g} s")
        except PlanLost as lost:
            return no_plan(request, str(lost))
        except OSError as error:
            return no_plan(request, f"the planner cannot be started: {error}")
        finally:
            self._asked -= 1

    async def close(self) -> None:
        """End the process; what is being solved is answered with an error. May be called again."""
        self._closed = True
        self._drop("the planner is closed")
        for pipe in self._dropped:
            if not await pipe.ended(CLOSE_S):
                log.warning("the planner (pid %d) has not ended within %g s of SIGKILL", pipe.pid, CLOSE_S)

    async def _solve(self, request: PlanRequest) -> PlacementPlan:
        if self._closed:
            raise PlanLost("the planner is closed")
        try:
            frame = pack_request(request)
        except (ProtocolError, TypeError) as error:
            raise PlanLost(f"a request that does not travel: {error}") from error
        loop = asyncio.get_running_loop()
        if self._pipe is None:
            self._pipe = PlannerPipe(loop, self._module, self._take, self._drop)
        self._answer = loop.create_future()
        try:
            self._pipe.send(frame)
            plan = await self._answer
        except asyncio.CancelledError:
            self._drop("")  # its answer, which nobody waits for any more, would be taken for the next one's
            raise
        finally:
            self._answer = None
        shapes = (plan.placement.shape, plan.moves.shape[1:])
        if plan.number != request.number or shapes != (request.placement.shape, (4,)):
            self._drop("")
            asked = f"request {request.number} for {request.placement.shape}"
            raise PlanLost(f"the planner answered {asked} with plan {plan.number} of {shapes[0]} and {shapes[1]}")
        return plan

    def _take(self, plan: PlacementPlan) -> None:
        if self._answer is None or self._answer.done():
            self._drop("the planner said more than it was asked")
        else:
            self._answer.set_result(plan)

    def _drop(self, text: str) -> None:
        """The process is not used any more; ``text`` is the answer to what it was asked."""
        if self._pipe is not None:
            self._pipe.drop()
            self._dropped = [pipe for pipe in (*self._dropped, self._pipe) if not pipe.has_ended]
            self._pipe = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(PlanLost(text))
