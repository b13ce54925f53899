"""All that the coordinator decides, in one place: messages and ``now`` in, messages out; no socket, no clock, no task.

Membership says which ranks there are and forms their epochs; the core plans their steps; clocks say who takes too long;
the quarantine finds the request that kills. Here they are told of each other. The coordinator is the shell around it,
and so is the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from drumline.engine.core.coordination_config import CoordinationConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.expert_balance import ExpertBalance
from drumline.engine.core.fault_book import FaultBook
from drumline.engine.core.liveness import GroupClock, furthest_behind
from drumline.engine.core.members import (
    Called,
    Ended,
    EpochReady,
    FaultSeen,
    GroupClosed,
    JoinDue,
    Leased,
    Output,
    Ready,
    ToReplica,
)
from drumline.engine.core.membership import Membership
from drumline.engine.core.restored import RestoredRequest
from drumline.engine.core.results import check_acknowledgement
from drumline.engine.core.suspicion import Suspicion
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    Beat,
    CallResult,
    Exited,
    FromWorkerSide,
    HelloSupervisor,
    Spawned,
    Staged,
    StepDone,
    Stopping,
)


class Coordination:
    """One engine. ``restored``: what a journal knows of unfinished requests. ``core`` is None until ranks are ready."""

    def __init__(
        self,
        config: CoordinationConfig,
        *,
        new_token: Callable[[], str],
        now: float,
        restored: Sequence[RestoredRequest] = (),
    ) -> None:
        self.config = config
        self.term = config.membership.term
        self.membership = Membership(config.membership, new_token, now, unfinished=bool(restored))
        self.core: EngineCore | None = None
        self.faults = FaultBook()
        layout = config.layout
        self.clocks = [
            GroupClock(config.step_deadline_s, layout.pipeline_parallel_size) for _ in self.membership.groups
        ]
        self.membership.epochs.leave_s = lambda group, at: self.clocks[group].leave_s(at)
        #: None where experts stay where they are.
        self.balance: ExpertBalance | None = None
        if config.balance is not None:
            self.balance = ExpertBalance(config.balance, config.membership, self.membership)
        self._suspicion = Suspicion()
        self._restored = restored
        self._ranks_of = [layout.ranks_of_replica(replica) for replica in range(layout.num_replicas)]
        self._answers_for = {layout.reporting_rank(replica): replica for replica in range(layout.num_replicas)}
        self._group_of = {rank: record.group for rank, record in self.membership.ranks.items()}
        self._joining: set[int] = set()
        self._ready_epochs: dict[int, EpochReady] = {}
        self._out: list[Output] = []

    # ------------------------------------------------------------------------------------------------- what comes in

    def from_workers(self, peer: bytes, message: FromWorkerSide, now: float) -> bool:
        """Anything from a rank or the supervisor. What is to be done about it is in :meth:`take`.

        Returns whether clients should be served now: not yet after a reply to a step that others still owe replies to,
        because the tokens of all replicas are booked together.
        """
        membership = self.membership
        if isinstance(message, StepDone):
            return self._step_done(peer, message, now)
        if isinstance(message, CallResult):
            if membership.accepts(peer, message):
                group = self._group_of[message.rank]
                self.clocks[group].answered(message.call_id, now)
                self._out.append(Called(message))
                if group in self._joining:
                    self._drained(group, now)
        elif isinstance(message, Staged):
            if self.balance is not None and membership.accepts(peer, message):
                self.balance.staged(message, now)
                self.balanced(now)
        elif isinstance(message, HelloSupervisor):
            self._react(membership.supervisor_hello(peer, message, now), now)
        elif isinstance(message, Spawned | Exited | Stopping | Beat):
            if membership.is_owner(peer):
                membership.owner_heard(now)
                self._from_owner(message, now)
        else:
            self._react(membership.receive(peer, message, now), now)
        return True

    def _from_owner(self, message: Spawned | Exited | Stopping | Beat, now: float) -> None:
        if isinstance(message, Spawned):
            self.membership.spawned(message)
        elif isinstance(message, Exited):
            self._react(self.membership.exited(message, now), now)
        elif isinstance(message, Stopping):
            self._out.append(Ended(message.reason, message.error))

    def _step_done(self, peer: bytes, message: StepDone, now: float) -> bool:
        membership, core, rank = self.membership, self.core, message.rank
        if core is None or not membership.accepts(peer, message):
            return True
        group = self._group_of[rank]
        clock = self.clocks[group]
        if not clock.owes(rank, message.step):
            membership.refusals.out_of_order += 1
            return False
        replica = self._answers_for.get(rank)
        try:
            if replica is not None:
                core.apply(replica, message, now)
            else:
                check_acknowledgement(message)
            if self.balance is not None:
                self.balance.step_done(rank, message, now)
        except ProtocolError as error:
            self._impossible_reply(rank, message.step, error.text, now)
            return True
        except ValueError as error:
            self._impossible_reply(rank, message.step, str(error), now)
            return True
        membership.step_done(rank, message.step)
        complete = clock.done(rank, message.step, now)
        if self.balance is not None:
            self._say_balance()
        if complete and group in self._joining:
            self._drained(group, now)
        if complete or replica is not None:
            self.plan(now)
        if complete and self._suspicion:
            self._suspicion.look(core)
            self._out.extend(self._suspicion.take())
        return complete

    def unreachable(self, rank: int, text: str, now: float) -> None:
        """Something could not be sent to ``rank``."""
        self._lost(rank, "unreachable", text, -1, now)

    def _impossible_reply(self, rank: int, step: int, why: str, now: float) -> None:
        record = self.membership.ranks[rank]
        text = f"rank {rank} (pid {record.pid}) gave an impossible reply to step {step}: {why}"
        self._lost(rank, "protocol", text, step, now)

    def _lost(self, rank: int, kind: str, text: str, step: int, now: float) -> None:
        record = self.membership.ranks[rank]
        error = ErrorInfo(
            kind="request_failed",
            text=text,
            retryable=True,
            rank=rank,
            incarnation=record.incarnation,
            epoch=self.membership.groups[record.group].epoch,
            step=step,
        )
        self._react(self.membership.declare_lost(rank, kind, error, now), now)

    # ------------------------------------------------------------------------------------------------------------ time

    def due_at(self, now: float) -> float | None:
        """When :meth:`tick` wants to be called, None: not before something has happened."""
        moments = [self.membership.due_at, *(clock.due_at() for clock in self.clocks)]
        if self.balance is not None:
            moments.append(self.balance.due_at)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self, now: float) -> None:
        """What is due at ``now``: steps that take too long, ranks that are silent, epochs that do not form."""
        for clock in self.clocks:
            overdue = clock.overdue(now)
            if overdue is None:
                continue
            records = self.membership.ranks
            record = records[furthest_behind(overdue.ranks, records)]
            where = "inside" if record.inside else "outside of"
            text = (
                f"rank {record.rank} (pid {record.pid}) is furthest behind in step {overdue.step}, which took "
                f"{overdue.waited_s:.1f} s of at most {overdue.limit_s:.1f} s: last seen in step {record.step}, "
                f"{where} collective {record.collective}"
            )
            self._lost(record.rank, "wedged", text, overdue.step, now)
        self._react(self.membership.tick(now), now)
        self._tick_balance(now)
        if self.core is not None:
            self.core.tick(now)
            if self._suspicion and self._confined_for_good():
                self._suspicion.move(self.core)
                self._out.extend(self._suspicion.take())
            for group in list(self._joining):
                self._drained(group, now)

    def _tick_balance(self, now: float) -> None:
        if self.balance is None:
            return
        late = self.balance.tick(now)
        if late is not None:
            # Most of them wait for another one, and without one the epoch is over, and what is on its way with it.
            records = self.membership.ranks
            rank = furthest_behind(late.ranks, records)
            self._lost(rank, "wedged", late.text, records[rank].step, now)
        self.balanced(now)

    def balanced(self, now: float) -> None:
        """Something has been said to :attr:`balance`: pass on what it answers, and make the steps that it demands."""
        self._say_balance()
        if self.core is not None:
            self.core.wake(0)  # all ranks of a model with experts are one lockstep group
            self.plan(now)

    def _say_balance(self) -> None:
        if self.balance is not None:
            self._out.extend(self.balance.take())

    def _confined_for_good(self) -> bool:
        """Whether the replica of the confined lacks a rank that is not started again."""
        replica, core = self._suspicion.replica, self.core
        if replica is None or core is None or replica in core.serving:
            return False
        ranks = self.config.layout.replica_ranks(replica // self.config.core.attention_data_parallel_size)
        return any(self.membership.ranks[rank].crash_looping for rank in ranks)

    # ----------------------------------------------------------------------------------------------------------- steps

    def plan(self, now: float) -> None:
        """Plan steps while there are any. Due after every change of the core."""
        core = self.core
        if core is None:
            return
        while plans := core.plan(now):
            # One step of one group: what its clock must know is the same for all replicas.
            first, sent = plans[0]
            clock = self.clocks[self._group_of[self._ranks_of[first][0]]]
            tokens = int(sent.num_tokens_across_dp.max())
            for replica, step in plans:
                ranks = self._ranks_of[replica]
                for rank in ranks:
                    clock.sent(rank, step.step, tokens, now)
                self._out.append(ToReplica(ranks, step))
            if self.balance is not None:
                self._say_balance()

    # -------------------------------------------------------------------------------------------- what membership says

    def _react(self, outputs: Sequence[Output], now: float) -> None:
        # The rows that a fault names are those of the epoch that it ends.
        for output in outputs:
            if isinstance(output, FaultSeen):
                self._fault(output, now)
        for output in outputs:
            if isinstance(output, GroupClosed):
                self._closed(output, now)
            elif isinstance(output, EpochReady):
                self._epoch_ready(output, now)
            elif isinstance(output, JoinDue):
                self._join_due(output.group, now)
            elif isinstance(output, Leased):
                self.clocks[output.group].lease(output.rank, output.step, output.seconds, now)
            elif not isinstance(output, FaultSeen):
                self._out.append(output)
        if outputs:
            self.plan(now)

    def _fault(self, fault: FaultSeen, now: float) -> None:
        self.faults.add(fault, now)
        if self.core is not None:
            self._suspicion.fault(fault, self.core, self._replica_within_group(fault.rank))
            if fault.inside and self._suspicion:
                self.membership.forgive(fault.rank, now)
            self._out.extend(self._suspicion.take())

    def _replica_within_group(self, rank: int) -> int:
        together = self.config.core.replicas_per_group
        return self.config.layout.replica_of(rank) % together

    def _closed(self, closed: GroupClosed, now: float) -> None:
        group = closed.group
        self._joining.discard(group)
        self._ready_epochs.pop(group, None)
        self.clocks[group].forget()
        core = self.core
        if core is not None:
            self._suspicion.closed(group, closed.epoch, core.suspects(group))
            core.hold(group, False)
            core.close_epoch(group, self._replicas(closed.lost), now)
        if self.balance is not None:
            self.balance.closed(now)
            self._say_balance()

    def _join_due(self, group: int, now: float) -> None:
        self._joining.add(group)
        if self.core is not None:
            self.core.hold(group, True)
        self._drained(group, now)

    def _drained(self, group: int, now: float) -> None:
        if self.core is not None and (self.core.in_flight(group) or self.clocks[group].owes_answers(now)):
            return
        self._joining.discard(group)
        self._react(self.membership.drained(group, now), now)

    def _replicas(self, dp_ranks: Sequence[int]) -> list[int]:
        """Attention replicas of engine replicas, all counted within their group."""
        parts = self.config.core.attention_data_parallel_size
        return [dp_rank * parts + part for dp_rank in dp_ranks for part in range(parts)]

    def _epoch_ready(self, ready: EpochReady, now: float) -> None:
        self._joining.discard(ready.group)
        self._ready_epochs[ready.group] = ready
        if self.core is not None:
            self._open(self.core, ready, now)
            return
        # The first time all groups are waited for; who takes over from another coordinator goes on with what there is.
        if len(self._ready_epochs) < len(self.membership.groups) and not self.membership.took_over:
            return
        config = self.config
        core = EngineCore(config.core, self._blocks(), self.term, config.seed, hash_key=config.hash_key)
        if self._restored:
            core.restore(self._restored, now)
        self.core = core
        for one in self._ready_epochs.values():
            self._open(core, one, now)
        self._out.append(Ready())

    def _open(self, core: EngineCore, ready: EpochReady, now: float) -> None:
        self.clocks[ready.group].forget()
        core.hold(ready.group, False)
        core.open_epoch(ready.group, ready.epoch, self._replicas(ready.serving), self._replicas(ready.kept))
        self.faults.recovered(ready.group, now)
        if self.balance is not None:
            self.balance.opened(ready, now)
            core.carry(ready.group, self.balance.balancer)
            self._say_balance()
        if self._suspicion:
            self._suspicion.look(core)

    def _blocks(self) -> list[int]:
        """KV blocks of every attention replica: as many as the rank with fewest has."""
        known: dict[int, int] = {}
        for ready in self._ready_epochs.values():
            known |= ready.num_blocks
        least = min(known.values())
        return [min((known[rank] for rank in ranks if rank in known), default=least) for ranks in self._ranks_of]

    # ------------------------------------------------------------------------------------------------------------- out

    def take(self) -> list[Output]:
        """What is to be sent and told, in order, and forgets it."""
        out, self._out = self._out, []
        return out
