"""The coordinator: sockets in, core, sockets out. A process of its own (:mod:`~drumline.engine.launch.coordinator`), or
inline in an app's loop (:mod:`~drumline.engine.launch.inline`).

Decisions are the core's; this shell owns the sockets, the clock and the tasks. Every task is supervised: one that dies
ends the engine with a typed error that clients and the supervisor are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import secrets
import traceback
import uuid
from typing import Any

import msgspec
import zmq

from drumline.engine.calls import RankCalls
from drumline.engine.client_connections import ClientConnection
from drumline.engine.client_port import ClientPort
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.evidence import Loss
from drumline.engine.core.members import EpochReady, Loading
from drumline.engine.core.results import check_acknowledgement
from drumline.engine.launch.external import waiting_event
from drumline.engine.launch.order import Order
from drumline.engine.resolve import ResolvedConfig, resolve
from drumline.engine.running_clock import TICK_S, RunningClock
from drumline.engine.snapshot import engine_status
from drumline.engine.worker_port import WorkerPort
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    CallRanks,
    CallRanksResult,
    CallResult,
    Event,
    Failed,
    Rejected,
    StepDone,
    Stopping,
    WelcomeClient,
)

log = logging.getLogger(__name__)

RETRY_S = 0.05
LAST_WORD_S = 0.15
"""When the lifeline ends, how long the supervisor's own explanation may still be on its way."""


class EngineState(enum.StrEnum):
    """As the status shows it. READY once every group is; CLOSING at a clean end, FAILED at one with an error."""

    STARTING = "starting"
    READY = "ready"
    CLOSING = "closing"
    FAILED = "failed"


class Coordinator:
    """One engine. Make it inside a running loop, then await :meth:`run`. It binds its sockets at once. Raises
    InvalidConfig when an endpoint cannot be bound or the model folder cannot be served."""

    def __init__(self, order: Order, resolved: ResolvedConfig | None = None) -> None:
        self.order = order
        self.resolved = (resolved or resolve(order.config)).in_folder(order.runtime_dir)
        self.incarnation = uuid.uuid4().hex
        self.state = EngineState.STARTING
        self.error: ErrorInfo | None = None
        self._clock = RunningClock()
        self._context: zmq.Context[Any] = zmq.Context()
        self._core: EngineCore | None = None
        self._blocks: dict[int, int] = {}
        layout = self.resolved.layout
        # By rank: the replica that it answers for.
        self._answers_for = {layout.reporting_rank(replica): replica for replica in range(layout.num_replicas)}
        self._welcome: WelcomeClient | None = None
        self._tokenizer = self.resolved.read_tokenizer()
        self._calls = RankCalls(order.term)
        self._ended = asyncio.Event()
        self._wake = asyncio.Event()
        self._reason = ""
        self._closed = False
        try:
            self.workers = WorkerPort(self._context, order, self.resolved, self, self._clock.now)
            try:
                self.clients = ClientPort(self._context, order.client_endpoint, self, self._clock.now)
            except BaseException:
                self.workers.close()
                raise
        except BaseException:
            self._context.term()
            raise

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
            self._close()
        return self.error

    def end(self, reason: str, error: ErrorInfo | None = None) -> None:
        """End the engine. The first call says why."""
        if self._ended.is_set():
            return
        self._reason = reason
        self.error = error
        self.state = EngineState.CLOSING if error is None else EngineState.FAILED
        self._ended.set()

    def _shut_down(self) -> None:
        """Every live request ends with an error, every client is told, workers and supervisor too."""
        closed = ErrorInfo(kind="engine_closed", text=self._reason or "the engine is closed")
        self._fail_requests(self.error or closed)
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
            now = self._clock.now()
            self.workers.tick(now)
            self.clients.tick(now)
            for call in self._calls.expire(now):
                self._answer(call.connection, call.result())
            self.changed(now)
            # What woke it is handled; what it waits for next is looked up anew. Cleared earlier, it would wake itself.
            self._wake.clear()

    def _until_next(self) -> float:
        now = self._clock.now()
        retry = now + RETRY_S if self.clients.connections.has_pending else None
        moments = (now + TICK_S, self.workers.membership.decides_at, self._calls.next_deadline, retry)
        return max(min(moment for moment in moments if moment is not None) - now, 0.0)

    # --------------------------------------------------------------------------------------------- serving

    @property
    def core(self) -> EngineCore | None:
        return self._core

    @property
    def device(self) -> str:
        records = self.workers.membership.ranks.values()
        return next((record.ready.device for record in records if record.ready is not None), "")

    def refusal(self) -> ErrorInfo | None:
        if self._ended.is_set():
            text = self.error.text if self.error is not None else self._reason
            return ErrorInfo(kind="engine_closed", text=f"the engine is {self.state.value}: {text}")
        if self._core is None:
            text = "the engine is still starting; submit after its welcome"
            return ErrorInfo(kind="request_failed", text=text, retryable=True)
        return None

    def changed(self, now: float) -> None:
        """Plan and send steps while there are any, then deliver, then do what can wait."""
        core = self._core
        if core is None or self._ended.is_set():
            return
        self._send_plans(core, now)
        self.clients.deliver(core)
        core.maintain(now)
        if self.workers.membership.decides_at is not None or self.clients.connections.has_pending:
            self._wake.set()

    def _send_plans(self, core: EngineCore, now: float) -> None:
        while plans := core.plan(now):
            for replica, step in plans:
                self.workers.send_step(replica, step, now)

    def step_done(self, rank: int, message: StepDone, complete: bool) -> None:
        core = self._core
        if core is None or self._ended.is_set():
            return
        now = self._clock.now()
        replica = self._answers_for.get(rank)
        try:
            if replica is not None:
                core.apply(replica, message, now)
            else:
                check_acknowledgement(message)
        except ProtocolError as error:
            self.workers.refused_reply(rank, message.step, error.text)
            return
        if complete:
            self.changed(now)
        elif replica is not None:
            self._send_plans(core, now)

    def client_left(self, connection: ClientConnection, now: float) -> None:
        self._calls.drop_connection(connection.number)
        if self._core is not None:
            self._core.drop_connection(connection.number, now)
            self.changed(now)

    def greet(self, connection: ClientConnection) -> None:
        if self._welcome is not None:
            self.clients.connections.reply(connection, self._welcome)
            return
        ranks = len(self.resolved.config.parallel.local_ranks)
        self.clients.connections.reply(connection, Event("starting", f"starting {ranks} worker processes"))
        awaited = self.workers.membership.awaited
        if self.workers.launch is not None and awaited:
            self.clients.connections.reply(connection, waiting_event(self.workers.launch, awaited))
        for warning in self.resolved.warnings:
            self.clients.connections.reply(connection, Event("warning", warning))

    def status_json(self, now: float) -> bytes:
        return msgspec.json.encode(engine_status(self, self._calls.late_replies, now))

    def call_ranks(self, connection: ClientConnection, message: CallRanks, now: float) -> None:
        opened = self._calls.open(connection.number, message, self.workers.epochs(), now)
        if isinstance(opened, ErrorInfo):
            self.clients.connections.reply(connection, Rejected(message.call_id, "", opened))
            return
        call, sends = opened
        if not sends:
            self.clients.connections.reply(connection, call.result())
        for rank, one in sends:
            if not self.workers.send_call(rank, one, message.timeout_s, now):
                for done in self._calls.unreachable(rank, f"rank {rank} cannot be reached"):
                    self._answer(done.connection, done.result())
        self._wake.set()

    def call_result(self, message: CallResult) -> None:
        done = self._calls.answer(message)
        if done is not None:
            self._answer(done.connection, done.result())

    def _answer(self, number: int, result: CallRanksResult) -> None:
        connection = self.clients.connections.numbered(number)
        if connection is not None:
            self.clients.connections.reply(connection, result)

    # ------------------------------------------------------------------------------------- what ranks become

    def loading(self, progress: Loading) -> None:
        text = f"rank {progress.rank} has loaded {progress.done} of {progress.total} bytes"
        self.clients.connections.broadcast(Event("loading", text, progress.rank, progress.done, progress.total))

    def epoch_ready(self, ready: EpochReady) -> None:
        group = self.workers.membership.groups[ready.group]
        self._blocks.update(zip(group.ranks, ready.num_blocks, strict=True))
        if not self.workers.membership.all_ready or self._core is not None:
            return
        config, layout = self.resolved.config, self.resolved.layout
        blocks = [
            min(self._blocks[rank] for rank in layout.ranks_of_replica(replica))
            for replica in range(layout.num_replicas)
        ]
        core = EngineCore(self.resolved.core, blocks, self.order.term, config.seed, hash_key=secrets.randbits(128))
        for one in self.workers.membership.groups:
            core.open_epoch(one.id, one.epoch)
        self._core = core
        self.state = EngineState.READY
        self._welcome = WelcomeClient(
            version=PROTOCOL_VERSION,
            term=self.order.term,
            digest=self.resolved.digest,
            info=self.resolved.model_info(min(blocks)),
            tokenizer=self._tokenizer,
        )
        self.clients.connections.broadcast(Event("ready", f"{len(self._blocks)} ranks are ready"))
        self.clients.connections.broadcast(self._welcome)

    def suspected(self) -> None:
        self._wake.set()

    def lost(self, loss: Loss) -> None:
        """A rank or the supervisor is lost. Without recovery that ends the engine, with every request told why."""
        error = loss.error
        if self._core is None:
            if loss.rank >= 0 or error.kind != "engine_closed":
                error = msgspec.structs.replace(error, kind="start_failed")
        else:
            step = error.step
            if loss.rank >= 0 and step < 0:
                step = self.workers.oldest_step(loss.rank)
            error = msgspec.structs.replace(error, kind="request_failed", retryable=True, step=step)
        log.error(error.text)
        self.clients.connections.broadcast(Event("fault", error.text, loss.rank))
        self.end(error.text, error)

    def owner_stopping(self, message: Stopping) -> None:
        self.end(message.reason, message.error)

    def owner_gone(self) -> None:
        """The lifeline has ended: the supervisor is gone, unless it says at this moment that it closes the engine."""
        text = f"the supervisor (pid {self.order.owner_pid}) is gone"
        error = ErrorInfo(kind="engine_closed", text=text)
        asyncio.get_running_loop().call_later(LAST_WORD_S, self.end, text, error)

    def _fail_requests(self, error: ErrorInfo) -> None:
        if self._core is None:
            return
        connections = self.clients.connections
        failed = self._core.fail_all()
        self.clients.deliver(self._core)
        for number, request_id in failed:
            connection = connections.numbered(number)
            if connection is not None:
                connections.reply(connection, Failed(request_id, error))
