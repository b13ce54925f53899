"""The coordinator's side towards workers and supervisor: their ROUTER, who they are, and the steps they owe.

Decisions are in :mod:`~drumline.engine.core.membership` and :mod:`~drumline.engine.core.liveness`; this shell moves
messages between them and the socket, and tells the coordinator what came of it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from drumline.engine.core.evidence import Loss
from drumline.engine.core.liveness import GroupClock, furthest_behind
from drumline.engine.core.members import (
    EpochReady,
    Loading,
    MembershipConfig,
    Output,
    RankRecord,
    RankState,
    ToOwner,
    ToPeer,
)
from drumline.engine.core.membership import Membership
from drumline.engine.launch.external import external_launch, write_launch_token
from drumline.engine.launch.order import Order
from drumline.engine.resolve import ResolvedConfig
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    CONTROL_METHODS,
    Beat,
    Call,
    CallResult,
    Exited,
    FromWorkerSide,
    HelloSupervisor,
    Shutdown,
    Spawned,
    Step,
    StepDone,
    Stopping,
    ToSupervisor,
    ToWorker,
)
from drumline.protocol.sockets import Router, SendResult

BEAT_S = 0.9
HWM = 1024
MAX_FRAME_BYTES = 64 << 20
MAX_HEAD_BYTES = 9 << 20
"""Room for the result of a control call. Arrays travel in frames of their own; what is decoded from the first one may
take many times its size in memory."""


class EngineEvents(Protocol):
    """What the coordinator is told."""

    def step_done(self, rank: int, message: StepDone, complete: bool) -> None:
        """A rank replied to a step; ``complete`` when it was the last rank of its group."""

    def epoch_ready(self, ready: EpochReady) -> None:
        """A lockstep group can compute."""

    def loading(self, progress: Loading) -> None:
        """A rank has read some of its weights."""

    def suspected(self) -> None:
        """Something is lost; what exactly, :meth:`WorkerPort.tick` tells at ``membership.decides_at``."""

    def lost(self, loss: Loss) -> None:
        """A rank, or the supervisor, is lost."""

    def call_result(self, message: CallResult) -> None:
        """A rank answered a control call."""

    def owner_stopping(self, message: Stopping) -> None:
        """The supervisor ends the engine."""


class WorkerPort:
    """Workers and supervisor of one engine. ``read_clock`` gives the time of the coordinator's running clock."""

    def __init__(
        self,
        context: zmq.Context[Any],
        order: Order,
        resolved: ResolvedConfig,
        events: EngineEvents,
        read_clock: Callable[[], float],
    ) -> None:
        self._events = events
        self._now = read_clock
        self._term = order.term
        self._beat_at = read_clock()
        self._to_workers: Codec[ToWorker] = Codec(ToWorker)
        self.router: Router[FromWorkerSide] = Router(
            context,
            order.worker_endpoint,
            Codec(FromWorkerSide, max_head_bytes=MAX_HEAD_BYTES),
            hwm=HWM,
            max_frame_bytes=MAX_FRAME_BYTES,
        )
        #: How the ranks that somebody else starts are started, None when there are none.
        self.launch = external_launch(order)
        self._disconnected = 0
        faults, parallel = resolved.config.faults, resolved.config.parallel
        self.membership = Membership(
            MembershipConfig(
                term=order.term,
                groups=resolved.groups,
                worker=resolved.worker,
                digest=resolved.digest,
                supervisor_token=order.supervisor_token,
                placements=resolved.placements,
                store_host=parallel.data_parallel_master_ip,
                store_port=parallel.data_parallel_master_port,
                start_deadline_s=faults.start_deadline_s,
                external_ranks=frozenset(self.launch.ranks if self.launch is not None else ()),
                launch_token=write_launch_token(self.launch) if self.launch is not None else "",
            ),
            new_token=lambda: secrets.token_urlsafe(24),
            now=read_clock(),
        )
        layout = resolved.layout
        self._ranks_of = [layout.ranks_of_replica(replica) for replica in range(layout.num_replicas)]
        self.clocks = [
            GroupClock(faults.step_deadline_s, layout.pipeline_parallel_size) for _ in self.membership.groups
        ]
        self._group_of = {rank: record.group for rank, record in self.membership.ranks.items()}

    async def serve(self) -> None:
        """Receive until cancelled."""
        while True:
            peer, message = await self.router.recv()
            now = self._now()
            if isinstance(message, StepDone):
                self._step_done(peer, message, now)
            elif isinstance(message, CallResult):
                if self.membership.accepts(peer, message):
                    self.clocks[self._group_of[message.rank]].answered(message.call_id, now)
                    self._events.call_result(message)
            elif isinstance(message, HelloSupervisor):
                self._carry_out(self.membership.supervisor_hello(peer, message, now))
            elif isinstance(message, Spawned | Exited | Stopping | Beat):
                self._from_owner(peer, message, now)
            else:
                self._carry_out(self.membership.receive(peer, message, now))
            self.settle(now)

    def _step_done(self, peer: bytes, message: StepDone, now: float) -> None:
        if not self.membership.accepts(peer, message):
            return
        clock = self.clocks[self._group_of[message.rank]]
        if not clock.owes(message.rank, message.step):
            self.membership.refusals.out_of_order += 1
            return
        self.membership.ranks[message.rank].replied = message.step
        complete = clock.done(message.rank, message.step, now)
        self._events.step_done(message.rank, message, complete)

    def _from_owner(self, peer: bytes, message: Spawned | Exited | Stopping | Beat, now: float) -> None:
        membership = self.membership
        if not membership.is_owner(peer):
            return
        membership.owner_heard(now)
        if isinstance(message, Spawned):
            membership.spawned(message)
        elif isinstance(message, Exited):
            membership.exited(message, now)
        elif isinstance(message, Stopping):
            self._events.owner_stopping(message)

    def settle(self, now: float) -> None:
        """Tell of a loss as soon as it is certain, and until then that there is one."""
        due = self.membership.decides_at
        if due is None:
            return
        if due <= now:
            self._probe_external_ranks()
            self._carry_out(self.membership.tick(now))
        else:
            self._events.suspected()

    def tick(self, now: float) -> None:
        """Deadlines; called about once a second."""
        disconnected = self.router.statistics().disconnected
        if disconnected != self._disconnected:
            self._disconnected = disconnected
            self._probe_external_ranks()
        for clock in self.clocks:
            overdue = clock.overdue(now)
            if overdue is not None:
                records = self.membership.ranks
                record = records[furthest_behind(overdue.ranks, records)]
                where = "inside" if record.inside else "outside of"
                text = (
                    f"rank {record.rank} (pid {record.pid}) is furthest behind in step {overdue.step}, which took "
                    f"{overdue.waited_s:.1f} s of at most {overdue.limit_s:.1f} s: last seen in step {record.step}, "
                    f"{where} collective {record.collective}"
                )
                self._declare_lost(record, text, overdue.step)
        self._carry_out(self.membership.tick(now))
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._to_owner(Beat(os.getpid()))

    def _probe_external_ranks(self) -> None:
        """Find out which ranks that no supervisor watches are gone: a connection ended, or a peer misses somebody.

        The socket does not say whose connection ended; a send does. What is sent is of no term, and dropped there.
        """
        for rank in self.launch.ranks if self.launch is not None else ():
            record = self.membership.ranks[rank]
            if record.state is not RankState.DEAD:
                self.send(rank, Call(0, 0, 0, "ping"))

    def _carry_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, ToPeer):
                self.send(output.rank, output.message)
            elif isinstance(output, ToOwner):
                self._to_owner(output.message)
            elif isinstance(output, EpochReady):
                self._events.epoch_ready(output)
            elif isinstance(output, Loading):
                self._events.loading(output)
            else:
                self._events.lost(output)

    # ------------------------------------------------------------------------------------------------- sending

    def send(self, rank: int, message: ToWorker) -> bool:
        """Send to a rank. A rank that cannot be reached or does not read is lost; returns whether it was sent."""
        record = self.membership.ranks[rank]
        if record.peer is None:
            return False
        return self._sent(record, self.router.send(record.peer, message))

    def _sent(self, record: RankRecord, result: SendResult) -> bool:
        if result is SendResult.SENT:
            return True
        why = "its connection is gone" if result is SendResult.GONE else f"it leaves {HWM} messages unread"
        self._declare_lost(record, f"rank {record.rank} (pid {record.pid}) cannot be reached: {why}", -1)
        return False

    def refused_reply(self, rank: int, step: int, why: str) -> None:
        """The core cannot use what ``rank`` replied to ``step``: the rank cannot be trusted with another."""
        record = self.membership.ranks[rank]
        text = f"rank {rank} (pid {record.pid}) gave an impossible reply to step {step}: {why}"
        self._declare_lost(record, text, step)

    def _declare_lost(self, record: RankRecord, text: str, step: int) -> None:
        error = ErrorInfo(
            kind="request_failed",
            text=text,
            retryable=True,
            rank=record.rank,
            incarnation=record.incarnation,
            epoch=self.membership.groups[record.group].epoch,
            step=step,
        )
        self.membership.declare_lost(record.rank, error, self._now())

    def send_step(self, replica: int, step: Step, now: float) -> None:
        """Send a plan, encoded once, to every rank of an attention replica; each owes a reply from ``now`` on."""
        ranks = self._ranks_of[replica]
        clock = self.clocks[self._group_of[ranks[0]]]
        tokens = int(step.num_tokens_across_dp.max()) if len(step.num_tokens_across_dp) else 0
        frames = self._to_workers.encode(step)
        for rank in ranks:
            clock.sent(rank, step.step, tokens, now)
            record = self.membership.ranks[rank]
            if record.peer is not None:
                self._sent(record, self.router.send_encoded(record.peer, frames))

    def send_call(self, rank: int, call: Call, timeout_s: float, now: float) -> bool:
        """Send a control call, whose time is no step's. Returns whether it was sent."""
        if call.method not in CONTROL_METHODS:
            self.clocks[self._group_of[rank]].called(rank, call.call_id, timeout_s, now)
        return self.send(rank, call)

    def _to_owner(self, message: ToSupervisor) -> None:
        owner = self.membership.owner
        if owner is not None:
            # A supervisor that is gone shows in the lifeline and in its silence.
            self.router.send(owner, message)

    def oldest_step(self, rank: int) -> int:
        """The oldest step in flight of the rank's group, -1 without one."""
        return self.clocks[self._group_of[rank]].oldest_step

    def epochs(self) -> dict[int, int]:
        """The epoch of each rank that can be called."""
        membership = self.membership
        return {
            rank: membership.groups[record.group].epoch
            for rank, record in membership.ranks.items()
            if record.peer is not None and record.state is RankState.READY
        }

    def shut_down(self, reason: str, error: ErrorInfo | None) -> None:
        """Tell every worker to end, and the supervisor to see to it."""
        for peer in self.membership.peers:
            self.router.send(peer, Shutdown(self._term, reason))
        self._to_owner(Stopping(reason, error))

    def close(self) -> None:
        """Close the socket. What was sent is still delivered for as long as its linger says."""
        self.router.close()
