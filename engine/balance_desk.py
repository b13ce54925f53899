"""What the balance of experts needs of the world: plans from another process, answers to who asked, a file of load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from drumline.engine.client_connections import ClientConnection, Connections
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.coordination import Coordination
from drumline.engine.core.decisions import PlanWanted, Rebalanced
from drumline.engine.core.expert_balance import ExpertBalance
from drumline.engine.expert_calls import load_record
from drumline.engine.expert_records import LoadRecord, save_load_record
from drumline.engine.launch.planner import Planner
from drumline.protocol.errors import ErrorInfo, InvalidConfig, InvalidRequest
from drumline.protocol.messages import (
    NO_MATRIX,
    NO_NUMBERS,
    Event,
    ExpertLoad,
    ExpertLoadQuery,
    ExpertsRebalanced,
    RebalanceExperts,
)

MAX_TIMEOUT_S = 86400.0
MAX_CALLERS = 1024
LAST_RECORD_S = 2.0
"""How long the end of an engine waits for a disk."""


@dataclass(frozen=True, slots=True)
class _Caller:
    connection: int
    call_id: int
    deadline: float
    timeout_s: float


class BalanceDesk:
    """Decisions are those of ``coordination.balance``, which is None where experts stay where they are; ``changed`` is
    called after something has been said to it, ``tell`` with what everybody should know."""

    def __init__(
        self,
        coordination: Coordination,
        connections: Connections,
        record_path: str | None,
        read_clock: Callable[[], float],
        changed: Callable[[float], None],
        tell: Callable[[Event], None],
        failed: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._coordination = coordination
        self._connections = connections
        self._now = read_clock
        self._changed = changed
        self._failed = failed
        self._callers: dict[int, _Caller] = {}
        self._numbers = 0
        self._plans: list[asyncio.Task[None]] = []
        self._recorder = _Recorder(record_path, tell) if record_path is not None else None
        balance = coordination.balance
        self._planner = Planner(balance.balancer.config.plan_deadline_s) if balance is not None else None

    # --------------------------------------------------------------------------------------------------------- callers

    def rebalance(self, connection: ClientConnection, message: RebalanceExperts, now: float) -> None:
        """Have experts rebalanced; the connection is answered when that is over, or why it cannot be."""
        balance = self._coordination.balance
        error = self._refusal(message)
        if balance is None or error is not None:
            self._reply(connection.number, ExpertsRebalanced(message.call_id, error=error or _NOT_BALANCED))
            return
        self._numbers += 1
        caller = self._numbers
        self._callers[caller] = _Caller(connection.number, message.call_id, now + message.timeout_s, message.timeout_s)
        try:
            balance.rebalance(caller, message.placement if message.placement.size else None, now)
        except InvalidConfig as wrong:
            del self._callers[caller]
            # It is the call that cannot be served as it stands, not the engine.
            info = msgspec.structs.replace(wrong.info, kind=InvalidRequest.kind)
            self._reply(connection.number, ExpertsRebalanced(message.call_id, error=info))
        self._coordination.balanced(now)
        self._changed(now)

    def _refusal(self, message: RebalanceExperts) -> ErrorInfo | None:
        if not 0.0 < message.timeout_s <= MAX_TIMEOUT_S:
            valid = f"seconds, above 0, at most {MAX_TIMEOUT_S:g}"
            return InvalidRequest("timeout", message.timeout_s, valid).info
        if self._coordination.core is None:
            return ErrorInfo(kind="request_failed", text="the engine is still starting", retryable=True)
        if len(self._callers) >= MAX_CALLERS:
            text = f"{MAX_CALLERS} calls wait for experts to be rebalanced, the most there may be"
            return ErrorInfo(kind="queue_full", text=text, retryable=True)
        return None

    def expert_load(self, connection: ClientConnection, message: ExpertLoadQuery) -> None:
        """Answer with the load of the window."""
        balance, call_id = self._coordination.balance, message.call_id
        if balance is None:
            answer = ExpertLoad(call_id, 0, NO_NUMBERS, NO_MATRIX, NO_MATRIX, _NOT_BALANCED)
        else:
            answer = balance.expert_load(call_id)
        self._connections.reply(connection, answer)

    @property
    def next_deadline(self) -> float | None:
        """The earliest of the calls that wait, None without any."""
        return min((caller.deadline for caller in self._callers.values()), default=None)

    def expire(self, now: float) -> None:
        """Answer the calls whose time is over; what they asked for goes on."""
        for number, caller in list(self._callers.items()):
            if caller.deadline <= now:
                del self._callers[number]
                text = f"experts were not rebalanced within {caller.timeout_s:g} s; it goes on"
                error = ErrorInfo(kind="request_failed", text=text, retryable=True)
                self._reply(caller.connection, ExpertsRebalanced(caller.call_id, error=error))

    def drop_connection(self, number: int) -> None:
        """The client is gone, and nobody waits for its answers."""
        self._callers = {key: caller for key, caller in self._callers.items() if caller.connection != number}

    def _reply(self, number: int, answer: ExpertsRebalanced) -> None:
        connection = self._connections.numbered(number)
        if connection is not None:
            self._connections.reply(connection, answer)

    # ----------------------------------------------------------------------------------------------------- decisions

    def carry_out(self, output: PlanWanted | Rebalanced) -> None:
        """Do what has been decided."""
        balance = self._coordination.balance
        if isinstance(output, Rebalanced):
            for number in output.callers:
                caller = self._callers.pop(number, None)
                if caller is not None:
                    self._reply(caller.connection, ExpertsRebalanced(caller.call_id, output.report))
            return
        if balance is None or self._planner is None:
            return
        if self._recorder is not None:
            self._recorder.write(balance.expert_load(0))
        work = self._plan(balance, self._planner, output.request)
        # The oldest is being solved; what waits behind it is wanted by nobody, and must not take the newest's turn.
        for superseded in self._plans[1:]:
            superseded.cancel()
        task = asyncio.get_running_loop().create_task(work, name="expert planning")
        self._plans.append(task)
        task.add_done_callback(self._planned)

    async def _plan(self, balance: ExpertBalance, planner: Planner, request: PlanRequest) -> None:
        plan: PlacementPlan = await planner.plan(request)
        now = self._now()
        balance.planned(plan, now)
        self._coordination.balanced(now)
        self._changed(now)

    def _planned(self, task: asyncio.Task[None]) -> None:
        self._plans.remove(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed(task)

    async def close(self, *, clean: bool) -> None:
        """End the planner's process; at a ``clean`` end the load is written down."""
        for task in self._plans:
            task.cancel()
        await asyncio.gather(*self._plans, return_exceptions=True)
        if self._planner is not None:
            await self._planner.close()
        balance = self._coordination.balance
        if self._recorder is not None and balance is not None:
            if clean:
                self._recorder.write(balance.expert_load(0))
            await self._recorder.close()


class _Recorder:
    """Writes the load record, one at a time, in a thread; of those that wait for it only the newest is kept."""

    def __init__(self, path: str, tell: Callable[[Event], None]) -> None:
        self._path = Path(path).expanduser()
        self._tell = tell
        self._waiting: LoadRecord | None = None
        self._writing: asyncio.Task[None] | None = None
        self._in_trouble = False

    def write(self, load: ExpertLoad) -> None:
        """Write ``load`` down, unless nothing has been counted: what the file has then says more."""
        if not len(load.steps):
            return
        self._waiting = load_record(load)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write_all(), name="load record")

    async def _write_all(self) -> None:
        while self._waiting is not None:
            record, self._waiting = self._waiting, None
            try:
                await asyncio.to_thread(save_load_record, self._path, record)
                self._in_trouble = False
            except Exception as error:
                if not self._in_trouble:
                    self._tell(Event("warning", f"the record of expert load is not written: {error}"))
                self._in_trouble = True

    async def close(self) -> None:
        """Wait for what is being written, not for long."""
        if self._writing is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._writing, LAST_RECORD_S)


_NOT_BALANCED = InvalidRequest(
    "enable_eplb", False, "an engine with enable_eplb=True, whose experts are spread over more than one rank"
).info
