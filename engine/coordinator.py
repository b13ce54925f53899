"""The coordinator: sockets in, decisions, sockets out. A process of its own, or inline in an app's loop
(:mod:`~drumline.engine.launch.coordinator`, :mod:`~drumline.engine.launch.inline`).

Decisions are :mod:`~drumline.engine.core.coordination`'s; this shell owns the sockets, the clock, the journal and the
tasks. Every task is supervised: one that dies ends the engine with a typed error that clients and the supervisor are
told.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import secrets
import traceback
import uuid
from pathlib import Path
from typing import Any

import msgspec
import zmq

from drumline.engine.balance_desk import BalanceDesk
from drumline.engine.call_desk import CallDesk
from drumline.engine.client_connections import ClientConnection
from drumline.engine.client_port import ClientPort
from drumline.engine.core.coordination import Coordination
from drumline.engine.core.coordination_config import CoordinationConfig
from drumline.engine.core.decisions import Log, PlanWanted, Rebalanced
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.members import Called, Ended, Loading, Output, Ready, Tell, ToOwner, ToPeer, ToReplica
from drumline.engine.core.membership import GATHER_S
from drumline.engine.experts_in_force import experts_in_force
from drumline.engine.inject_orders import InjectOrders
from drumline.engine.keeping import Keeping
from drumline.engine.launch.external import external_launch, launch_token, waiting_event
from drumline.engine.launch.order import Order
from drumline.engine.layout_report.running import layout_facts
from drumline.engine.membership_config import balance_config, membership_config
from drumline.engine.resolve import ResolvedConfig, resolve
from drumline.engine.running_clock import TICK_S, RunningClock
from drumline.engine.snapshot import engine_status
from drumline.engine.worker_port import WorkerPort
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    CallRanks,
    Event,
    Failed,
    InjectFaults,
    LayoutFacts,
    Leave,
    WelcomeClient,
)

log = logging.getLogger(__name__)

RETRY_S = 0.05
LAST_WORD_S = 0.15
"""When the lifeline ends, how long the supervisor's own explanation may still be on its way."""


class EngineState(enum.StrEnum):
    """As the status shows it. READY once every group is; RECOVERING while no replica serves; CLOSING at a clean end,
    FAILED at one with an error."""

    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    CLOSING = "closing"
    FAILED = "failed"


class Coordinator:
    """One engine. Make it inside a running loop, then await :meth:`run`. It binds its sockets at once. Raises
    InvalidConfig when an endpoint cannot be bound, the journal cannot be kept or the model folder cannot be served."""

    def __init__(self, order: Order, resolved: ResolvedConfig | None = None) -> None:
        self.order = order
        self.resolved = (resolved or resolve(order.config)).in_folder(order.runtime_dir)
        self.incarnation = uuid.uuid4().hex
        self.error: ErrorInfo | None = None
        self.clock = RunningClock()
        self._reason = ""
        self._end_state: EngineState | None = None
        self._welcome: WelcomeClient | None = None
        self._tokenizer = self.resolved.read_tokenizer()
        self._ended = asyncio.Event()
        self._wake = asyncio.Event()
        self._closed = False
        self._superseded_by_another = False
        self.keeping = Keeping(order, self._journal_changed, self._superseded)
        self.term = self.keeping.term
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._bind()
        except BaseException:
            self.keeping.close()
            self._context.term()
            raise

    def _bind(self) -> None:
        order, config = self.order, self.resolved.config
        #: How the ranks that somebody else starts are started, None when there are none.
        launch = external_launch(order)
        #: Ranks that an earlier coordinator admitted by the token may be on their way back.
        self._ranks_may_live = launch is not None and Path(launch.token_file).exists()
        token = launch_token(launch) if launch is not None else ""
        self.coordination = Coordination(
            CoordinationConfig(
                membership=membership_config(order, self.resolved, self.term, launch, token),
                core=self.resolved.core,
                layout=self.resolved.layout,
                seed=config.seed,
                hash_key=secrets.randbits(128),
                step_deadline_s=config.faults.step_deadline_s,
                balance=balance_config(self.resolved),
            ),
            new_token=lambda: secrets.token_urlsafe(24),
            now=self.clock.now(),
            restored=self.keeping.restored,
        )
        injection = config.fault_injection
        self.workers = WorkerPort(
            self._context, order.worker_endpoint, self.coordination, self.clock.now, self.changed, launch, injection
        )
        try:
            self.clients = ClientPort(self._context, order.client_endpoint, self, self.clock.now)
        except BaseException:
            self.workers.close()
            raise
        self._calls = CallDesk(self.term, self.workers, self.clients.connections)
        self.experts = BalanceDesk(
            self.coordination,
            self.clients.connections,
            config.parallel.eplb_config.record_path,
            self.clock.now,
            self.changed,
            self._tell,
            self._task_ended,
        )
        self._inject_orders = InjectOrders(self.workers, self.keeping, self.coordination, injection)

    # ---------------------------------------------------------------------------------------------- life

    async def run(self) -> ErrorInfo | None:
        """Serve until :meth:`end` or something fatal. Returns the fatal error, None after a clean end."""
        loop = asyncio.get_running_loop()
        tasks = [
            loop.create_task(self.workers.serve(), name="worker port"),
            loop.create_task(self.clients.serve(), name="client port"),
            loop.create_task(self._keep_time(), name="timekeeper"),
        ]
        for task in tasks:
            task.add_done_callback(self._task_ended)
        try:
            await self._ended.wait()
        finally:
            self._shut_down()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                await self.experts.close(clean=self.error is None)
            finally:
                self._close()
        return self.error

    def end(self, reason: str, error: ErrorInfo | None = None) -> None:
        """End the engine. The first call says why."""
        if self._ended.is_set():
            return
        self._reason = reason
        self.error = error
        self._end_state = EngineState.CLOSING if error is None else EngineState.FAILED
        self._ended.set()

    def _shut_down(self) -> None:
        """Every live request ends with an error, every client is told, workers and supervisor too. A coordinator whose
        place is taken says nothing: all of them are another's."""
        if self._superseded_by_another:
            self.keeping.close()
            return
        if self.error is not None:
            self.keeping.freeze()
        closed = ErrorInfo(kind="engine_closed", text=self._reason or "the engine is closed")
        self.clients.fail_requests(self.error or closed)
        # What waits to be kept is told before the end is.
        self.keeping.close()
        if self.error is None or self.error.kind in ("start_failed", "invalid_config"):
            last = self.error or closed
        else:
            last = msgspec.structs.replace(self.error, kind="engine_closed", retryable=False)
        self.clients.connections.broadcast(Failed("", last))
        self.workers.shut_down(self._reason, self.error)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self.clients.close()
            self.workers.close()
            # Closed sockets hand over what they hold for as long as their linger says.
            self._context.term()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._ended.is_set():
            return
        failure = task.exception()
        text = f"the coordinator's {task.get_name()} ended"
        trace = ""
        if failure is not None:
            text += f": {failure!r}"
            trace = "".join(traceback.format_exception(failure))
        log.critical("%s\n%s", text, trace)
        self.end(text, ErrorInfo(kind="engine_closed", text=text, traceback=trace))

    async def _keep_time(self) -> None:
        """Deadlines. Ticks once a second, earlier only when something waits for a moment."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._until_next()):
                    await self._wake.wait()
            self._wake.clear()
            now = self.clock.now()
            self.workers.tick(now)
            self.clients.tick(now)
            self._calls.expire(now)
            self.experts.expire(now)
            self.changed(now)

    def _until_next(self) -> float:
        now = self.clock.now()
        retry = now + RETRY_S if self.clients.connections.has_pending else None
        deadlines = (self._calls.next_deadline, self.experts.next_deadline)
        moments = (now + TICK_S, self.coordination.due_at(now), *deadlines, retry)
        return max(min(moment for moment in moments if moment is not None) - now, 0.001)

    # --------------------------------------------------------------------------------------------- serving

    @property
    def core(self) -> EngineCore | None:
        return self.coordination.core

    @property
    def state(self) -> EngineState:
        """What the status shows."""
        if self._end_state is not None:
            return self._end_state
        if self.core is None:
            return EngineState.STARTING
        return EngineState.READY if self.core.serving else EngineState.RECOVERING

    @property
    def device(self) -> str:
        records = self.coordination.membership.ranks.values()
        return next((record.loaded.device for record in records if record.loaded is not None), "")

    def refusal(self) -> ErrorInfo | None:
        if self._ended.is_set():
            text = self.error.text if self.error is not None else self._reason
            return ErrorInfo(kind="engine_closed", text=f"the engine is {self.state.value}: {text}")
        if self.core is None:
            text = "the engine is still starting; submit after its welcome"
            return ErrorInfo(kind="request_failed", text=text, retryable=True)
        return None

    def changed(self, now: float, serve: bool = True) -> None:
        """Plan and send steps while there are any; with ``serve`` then deliver, and do what can wait."""
        if self._ended.is_set():
            return
        self.coordination.plan(now)
        self._carry_out(now)
        if not serve:
            return
        core = self.core
        if core is not None and not self._ended.is_set():
            self.clients.deliver(core)
            core.maintain(now)
        if self.clients.connections.has_pending:
            self._wake.set()

    def _carry_out(self, now: float) -> None:
        # A send that fails is news for the decisions, which answer with more to send.
        while outputs := self.coordination.take():
            for output in outputs:
                self._do(output, now)

    def _do(self, output: Output, now: float) -> None:
        connections = self.clients.connections
        if isinstance(output, ToPeer | ToReplica | ToOwner):
            if isinstance(output, ToPeer) and isinstance(output.message, Leave):
                self._calls.void(output.rank)
            self.workers.carry_out(output, now)
        elif isinstance(output, Tell):
            self._tell(output.event)
        elif isinstance(output, Loading):
            text = f"rank {output.rank} has loaded {output.done} of {output.total} bytes"
            connections.broadcast(Event("loading", text, output.rank, output.done, output.total))
        elif isinstance(output, Called):
            self._calls.answered(output.message)
        elif isinstance(output, PlanWanted | Rebalanced):
            self.experts.carry_out(output)
        elif isinstance(output, Log):
            log.info("%s", output.text)
        elif isinstance(output, Ready):
            self._ready()
        elif isinstance(output, Ended):
            self._lost(output)

    def _tell(self, event: Event) -> None:
        level = logging.WARNING if event.kind in _WORTH_A_WARNING else logging.INFO
        log.log(level, "%s: %s", event.kind, event.text)
        self.clients.connections.broadcast(event)

    def client_left(self, connection: ClientConnection, now: float) -> None:
        self._calls.drop_connection(connection.number)
        self.experts.drop_connection(connection.number)
        if self.core is not None:
            self.core.drop_connection(connection.number, now)
            self.changed(now)

    def greet(self, connection: ClientConnection) -> None:
        if self._welcome is not None:
            self.clients.connections.reply(connection, self._welcome)
            return
        ranks = len(self.resolved.config.parallel.local_ranks)
        self.clients.connections.reply(connection, Event("starting", f"starting {ranks} worker processes"))
        if self._ranks_may_live:
            asyncio.get_running_loop().call_later(GATHER_S, self._tell_awaited, connection)
        else:
            self._tell_awaited(connection)
        for warning in self.resolved.warnings:
            self.clients.connections.reply(connection, Event("warning", warning))

    def _tell_awaited(self, connection: ClientConnection) -> None:
        awaited = self.coordination.membership.awaited
        if self.workers.launch is not None and awaited and not self._ended.is_set():
            self.clients.connections.reply(connection, waiting_event(self.workers.launch, awaited))

    def status_json(self, now: float) -> bytes:
        return msgspec.json.encode(engine_status(self, self._calls.late_replies, now))

    def layout_facts(self, call_id: int) -> LayoutFacts:
        placement, slots = experts_in_force(self.coordination)
        return layout_facts(call_id, self.resolved, placement, self.device or "cuda", slots)

    def inject(self, connection: ClientConnection, message: InjectFaults, now: float) -> None:
        self.clients.connections.reply(connection, self._inject_orders.take(message, now))
        self.changed(now)

    def call_ranks(self, connection: ClientConnection, message: CallRanks, now: float) -> None:
        self._calls.open(connection, message, now)
        self._wake.set()

    # ------------------------------------------------------------------------------------- what the engine becomes

    def _ready(self) -> None:
        core = self.coordination.core
        if core is None:
            return
        self.keeping.keep_whole(core)
        blocks = min(replica.blocks_total for replica in core.replica_status())
        self._welcome = WelcomeClient(
            version=PROTOCOL_VERSION,
            term=self.term,
            digest=self.resolved.digest,
            info=self.resolved.model_info(blocks),
            tokenizer=self._tokenizer,
            knows_all=self.keeping.knows_all,
            fault_injection=self.resolved.config.fault_injection,
            resume_window_s=self.resolved.config.faults.resume_window_s,
        )
        self.clients.connections.broadcast(Event("ready", f"{len(self.coordination.membership.ranks)} ranks are ready"))
        self.clients.connections.broadcast(self._welcome)

    def _lost(self, ended: Ended) -> None:
        """The engine cannot go on, or its supervisor closes it."""
        error = ended.error
        if error is not None:
            log.error(error.text)
            self.clients.connections.broadcast(Event("fault", error.text, error.rank))
        self.end(ended.reason, error)

    def _journal_changed(self, state: str, text: str) -> None:
        """The journal's state has changed: clients and the supervisor are told."""
        log.log(logging.INFO if state == "on" else logging.WARNING, "journal %s: %s", state, text)
        self.clients.connections.broadcast(Event("journal", f"journal: {state}: {text}"))
        self.workers.notice("journal", f"{state}: {text}")

    def _superseded(self, text: str) -> None:
        """Another coordinator has taken over: this one must say and do nothing more."""
        log.critical("%s", text)
        self._superseded_by_another = True
        self.end(text, ErrorInfo(kind="engine_closed", text=text))

    def owner_gone(self) -> None:
        """The lifeline has ended: the supervisor is gone, unless it says at this moment that it closes the engine."""
        text = f"the supervisor (pid {self.order.owner_pid}) is gone"
        error = ErrorInfo(kind="engine_closed", text=text)
        asyncio.get_running_loop().call_later(LAST_WORD_S, self.end, text, error)


_WORTH_A_WARNING = frozenset({"fault", "crash_loop", "quarantine", "poisoned", "numeric", "warning"})
