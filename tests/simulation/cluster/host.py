"""The coordinator's process: the real decisions, the real client port and delivery, on simulated sockets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from drumline.engine.client_connections import ClientConnection
from drumline.engine.core.decisions import PlanWanted, Rebalanced
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.members import Ended, Loading, Ready, Tell, ToOwner, ToPeer, ToReplica
from drumline.engine.running_clock import RunningClock
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Beat,
    Event,
    Failed,
    FromClient,
    FromWorkerSide,
    ModelInfo,
    Shutdown,
    Stopping,
    ToClient,
    WelcomeClient,
)
from drumline.protocol.transport import SendResult
from tests.simulation.cluster.keeping import SimKeeping
from tests.simulation.cluster.planner import SimPlanner
from tests.simulation.cluster.ports import SimClientPort, WatchedCoordination
from tests.simulation.cluster.shape import DIGEST, RESUME_WINDOW_S

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster

TICK_S = 1.0
NOTICED_S = 0.05
"""So long after a connection has ended the socket says so at a send."""


class Host:
    """One coordinator. ``alive`` until it is killed or ends the engine; ``ended`` is the engine's end."""

    def __init__(self, cluster: Cluster, term: int) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.term = term
        self.alive = True
        self._stopped = False
        self._running = RunningClock(lambda: self.clock.now)
        self._asleep: list[Callable[[], None]] = []
        self.ended: Ended | None = None
        self.keeping = SimKeeping(cluster, self)
        self.coordination = WatchedCoordination(
            cluster.shape.coordination(term, cluster.seed),
            new_token=cluster.new_token,
            now=self.now,
            restored=self.keeping.restored,
        )
        self.coordination.on_plan = partial(cluster.rules.watch, self)
        self.coordination.watch_load(partial(cluster.rules.counted, self))
        self.planner = SimPlanner(self)
        self.clients = SimClientPort(self)
        self.welcome: WelcomeClient | None = None
        self._gone_at: dict[bytes, float] = {}
        self._beat_at = 0.0
        self.clock.after(TICK_S, self._tick)

    @property
    def now(self) -> float:
        """Of the real running clock: time in which this process was stopped does not count."""
        return self._running.now()

    def act(self, do: Callable[[], None]) -> None:
        """Do something in this process: not while it is stopped, nor after its end."""
        if self._stopped:
            self._asleep.append(do)
        elif self.alive:
            do()

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT in ``seconds``."""
        if self.alive and not self._stopped:
            self._stopped = True
            self.clock.after(seconds, self._go_on)

    def _go_on(self) -> None:
        self._stopped = False
        asleep, self._asleep = self._asleep, []
        for do in asleep:
            self.act(do)

    @property
    def core(self) -> EngineCore | None:
        return self.coordination.core

    # -------------------------------------------------------------------- what comes in

    def from_ranks(self, identity: bytes, message: FromWorkerSide) -> None:
        """Anything from a rank or the supervisor."""
        self.act(partial(self._from_ranks, identity, message))

    def _from_ranks(self, identity: bytes, message: FromWorkerSide) -> None:
        now = self.now
        self.changed(now, self.coordination.from_workers(identity, message, now))

    def from_client(self, identity: bytes, message: FromClient) -> None:
        """Anything from a client."""
        self.act(partial(self._from_client, identity, message))

    def _from_client(self, identity: bytes, message: FromClient) -> None:
        if self.clock.verbose:
            self.clock.note(f"{identity!r} says {message}")
        now = self.now
        self.cluster.rules.note_waves()
        self.clients.receive(identity, message, now)
        self.changed(now)

    def client_lost(self, identity: bytes) -> None:
        """The socket says that a client's connection has ended."""
        self.act(lambda: self.clients.lost(identity, self.now))

    def _tick(self) -> None:
        self.act(self._tick_now)

    def _tick_now(self) -> None:
        now = self.now
        self.coordination.tick(now)
        self.clients.tick(now)
        if now - self._beat_at >= 0.9:
            self._beat_at = now
            self._to_owner(Beat(0))
        self.changed(now)
        if not self.alive:
            return
        due = self.coordination.due_at(now)
        moment = now + TICK_S if due is None else min(now + TICK_S, due)
        self.clock.after(max(moment - now, 0.001), self._tick)

    # -------------------------------------------------------------------- what the port asks for

    def refusal(self) -> ErrorInfo | None:
        """Why nothing is admitted now."""
        if self.core is None:
            return ErrorInfo(kind="request_failed", text="the engine is still starting", retryable=True)
        return None

    def greet(self, connection: ClientConnection) -> None:
        """Tell a client whether the engine is ready."""
        if self.welcome is not None:
            self.clients.connections.reply(connection, self.welcome)
        else:
            self.clients.connections.reply(connection, Event("starting", "starting"))

    def client_left(self, connection: ClientConnection, now: float) -> None:
        """A client is gone."""
        if self.core is not None:
            self.core.drop_connection(connection.number, now)
            self.changed(now)

    def changed(self, now: float, serve: bool = True) -> None:
        """As the coordinator does after everything that came in."""
        if not self.alive:
            return
        self.coordination.plan(now)
        self._carry_out(now)
        core = self.core
        if serve and core is not None and self.alive:
            self.clients.deliver(core)
            core.maintain(now)
            self.cluster.rules.note_waves()

    # -------------------------------------------------------------------- what goes out

    def _carry_out(self, now: float) -> None:
        while self.alive and (outputs := self.coordination.take()):
            rules = self.cluster.rules
            rules.sent(self, outputs)
            for output in outputs:
                self._do(output, now)

    def _do(self, output: Any, now: float) -> None:
        if isinstance(output, ToReplica):
            for rank in output.ranks:
                peer = self.coordination.membership.ranks[rank].peer
                if peer is not None:
                    self._to_rank(rank, peer, output.step, now)
        elif isinstance(output, ToPeer):
            self._to_rank(output.rank, output.peer, output.message, now)
        elif isinstance(output, ToOwner):
            self._to_owner(output.message)
        elif isinstance(output, Tell):
            self._tell(output.event)
        elif isinstance(output, Ready):
            self._ready()
        elif isinstance(output, Ended):
            self.end(output)
        elif isinstance(output, PlanWanted):
            self.planner.plan(output.request)
        elif isinstance(output, Rebalanced):
            self.planner.rebalanced(output)
        elif isinstance(output, Loading):
            self.clock.seen["loading"] += 1

    def _to_rank(self, rank: int, peer: bytes, message: Any, now: float) -> None:
        line = self.cluster.hub.lines.get(peer)
        if line is not None and line.down.is_open:
            line.down.send(message)
            return
        first = self._gone_at.setdefault(peer, now)
        if now - first >= NOTICED_S:
            self.coordination.unreachable(rank, f"rank {rank} cannot be reached: its connection is gone", now)

    def _to_owner(self, message: Any) -> None:
        line = self.cluster.supervisor.line
        if line is not None:
            line.down.send(message)

    def _tell(self, event: Event) -> None:
        self.clock.seen["event_" + event.kind] += 1
        if event.fault:
            self.clock.seen["told_" + event.fault] += 1
        self.clock.note(f"event {event.kind}: {event.text} {' '.join(event.request_ids)}")
        self.clients.connections.broadcast(event)

    def to_client(self, identity: bytes, message: ToClient) -> SendResult:
        """The client socket's send."""
        line = self.cluster.hub.lines.get(identity)
        if line is None or not line.down.is_open:
            return SendResult.GONE
        if self.cluster.is_full(identity):
            return SendResult.FULL
        self.cluster.rules.delivered(self, identity, message)
        line.down.send(message)
        return SendResult.SENT

    def _ready(self) -> None:
        shape = self.cluster.shape
        if self.core is not None:
            self.keeping.keep_whole(self.core)
        self.clock.note(f"term {self.term} is ready")
        self.welcome = WelcomeClient(
            version=PROTOCOL_VERSION,
            term=self.term,
            digest=DIGEST,
            info=ModelInfo(
                model="simulated",
                served_model_name="simulated",
                vocab_size=shape.core.vocab_size,
                max_model_len=shape.core.max_model_len,
                eos_token_ids=shape.core.eos_token_ids,
                data_parallel_size=shape.layout.data_parallel_size,
                max_prompt_tokens=shape.core.max_model_len - 1,
                has_tokenizer=False,
            ),
            tokenizer=b"",
            knows_all=self.keeping.knows_all,
            resume_window_s=RESUME_WINDOW_S,
        )
        self.clients.connections.broadcast(self.welcome)

    # -------------------------------------------------------------------- its end

    def end(self, ended: Ended) -> None:
        """The engine ends: every request with an error, every rank is told."""
        self.clock.note(f"the engine ends: {ended.reason}")
        error = ended.error or ErrorInfo(kind="engine_closed", text=ended.reason)
        self.cluster.rules.engine_ended(self, ended)
        self.ended = ended
        self.clients.fail_requests(error)
        self.keeping.flush()
        self.clients.connections.broadcast(Failed("", error))
        for peer in self.coordination.membership.peers:
            line = self.cluster.hub.lines.get(peer)
            if line is not None:
                line.down.send(Shutdown(self.term, ended.reason))
        self._to_owner(Stopping(ended.reason, ended.error))
        self.alive = False
        self.cluster.engine_ended = True

    def kill(self) -> None:
        """SIGKILL. What was committed stays; nothing else does."""
        self.clock.note(f"the coordinator of term {self.term} is killed")
        self.alive = False
        self.keeping.crash()
        self.cluster.hub.close()
        self.clock.after(0.0, partial(self.cluster.rules.coordinator_died, self))
