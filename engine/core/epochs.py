"""How the epochs of lockstep groups form: messages in, messages out; no I/O.

``Leave`` to every rank that has loaded, ``Left`` from all with what they hold; with whole engine replicas among them
``OpenStore`` to the first rank that computes when there is more than one, ``StoreReady``; ``Configure`` to all,
``Ready`` from all. A fault at any stage begins the next epoch. Without a whole engine replica the group gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from drumline.engine.core.balance.places import number_hosts
from drumline.engine.core.decisions import EpochReady, GroupClosed, JoinDue, Output, Tell, ToPeer
from drumline.engine.core.members import GroupRecord, GroupStage, MembershipConfig, RankRecord, RankState, Refusals
from drumline.engine.core.refit import plan_refit
from drumline.protocol.messages import Configure, Event, Leave, Left, Member, OpenStore, Ready, StoreReady, ToWorker

LEAVE_S = 2.0
FIRST_LEAVE_S = 10.0
STORE_S = 5.0
READY_S = 10.0


class Epochs:
    """The epochs of all groups. Shares its records with :class:`~drumline.engine.core.membership.Membership`, which
    checks who speaks. ``may_begin(group)``: whether the first epoch of a group need not wait for more ranks.

    ``leave_s(group, now)`` says how long ranks may take to come out of the steps in flight. ``starting``: whether the
    engine has yet to be ready for the first time."""

    def __init__(
        self,
        config: MembershipConfig,
        groups: Sequence[GroupRecord],
        ranks: Mapping[int, RankRecord],
        refusals: Refusals,
        may_begin: Callable[[GroupRecord], bool],
    ) -> None:
        self._config = config
        self._groups = groups
        self._ranks = ranks
        self._refusals = refusals
        self._may_begin = may_begin
        self.starting = True
        self.leave_s: Callable[[int, float], float] = lambda group, now: LEAVE_S

    # ------------------------------------------------------------------------------------------------ who is there

    def replicas(self, group: GroupRecord) -> list[tuple[int, ...]]:
        """The ranks of each engine replica of the group."""
        size = self._config.layout.world_size
        return [group.ranks[first : first + size] for first in range(0, len(group.ranks), size)]

    def whole(self, group: GroupRecord) -> list[int]:
        """The dp ranks, counted within the group, whose every rank lives and has loaded."""
        return [
            dp_rank
            for dp_rank, ranks in enumerate(self.replicas(group))
            if all(self._ranks[rank].usable for rank in ranks)
        ]

    def _kept(self, ranks: Sequence[int]) -> bool:
        """Whether the KV of an engine replica is as it was when it last computed."""
        records = [self._ranks[rank] for rank in ranks]
        return all(not one.lost and one.has_computed for one in records)

    def belongs(self, record: RankRecord) -> bool:
        """Whether the loss of the rank ends what its group's epoch is, or is about to be."""
        group = self._groups[record.group]
        if group.stage is GroupStage.GATHERING:
            return False
        if group.stage is GroupStage.LEAVING:
            return record.rank in group.waiting or record.left is not None
        if record.rank in group.members:
            return True
        return group.stage in (GroupStage.OPENING_STORE, GroupStage.FORMING) and record.rank in group.parked

    # --------------------------------------------------------------------------------------------------- beginnings

    def consider(self, group: GroupRecord, now: float) -> list[Output]:
        """A rank has loaded, or an epoch has opened: form the next epoch if there is reason to."""
        whole = self.whole(group)
        if group.stage is GroupStage.OPEN:
            replicas = self.replicas(group)
            if all(rank in group.members for dp_rank in whole for rank in replicas[dp_rank]):
                return []
            group.stage = GroupStage.DRAINING
            return [JoinDue(group.id)]
        if group.stage is not GroupStage.GATHERING or not whole:
            return []
        if len(whole) < len(self.replicas(group)) and not self._may_begin(group):
            return []
        if self._processes(group, whole) == group.tried:
            return []
        return self._leave(group, now)

    def _processes(self, group: GroupRecord, dp_ranks: Sequence[int]) -> frozenset[str]:
        replicas = self.replicas(group)
        return frozenset(self._ranks[rank].incarnation for dp_rank in dp_ranks for rank in replicas[dp_rank])

    def drained(self, group: GroupRecord, now: float) -> list[Output]:
        """No step is in flight: who has come may join."""
        if group.stage is not GroupStage.DRAINING:
            return []
        group.stood_at = now
        return self._leave(group, now)

    def fell(self, group: GroupRecord, why: str, now: float) -> list[Output]:
        """A fault has ended what the group's epoch is, or is about to be."""
        if group.stage is GroupStage.GATHERING:
            return []
        if group.is_open:
            group.stood_at = now
        if group.fault_at is None:
            group.fault_at = now
        replicas = self.replicas(group)
        lost = tuple(dp_rank for dp_rank in group.served if not self._kept(replicas[dp_rank]))
        outputs: list[Output] = [GroupClosed(group.id, group.epoch, lost)]
        outputs += self._leave(group, now)
        text = f"the ranks of group {group.id} come together anew as epoch {group.epoch}: {why}"
        outputs.append(Tell(Event("regroup", text, group=group.id, epoch=group.epoch, term=self._config.term)))
        return outputs

    def _leave(self, group: GroupRecord, now: float) -> list[Output]:
        # While steps are in flight: what they may take is known then.
        limit = max(LEAVE_S, self.leave_s(group.id, now))
        group.epoch += 1
        group.members = group.parked = ()
        group.refit = None
        group.waiting = {rank for rank in group.ranks if self._ranks[rank].usable}
        if not group.waiting:
            group.stage = GroupStage.GATHERING
            return []
        self._stage(group, GroupStage.LEAVING, max(limit, FIRST_LEAVE_S) if self.starting else limit, now)
        outputs: list[Output] = []
        for rank in sorted(group.waiting):
            record = self._ranks[rank]
            record.state = RankState.PARKED
            record.left = None
            outputs += self._to(rank, Leave(self._config.term, group.epoch))
        return outputs

    def _stage(self, group: GroupRecord, stage: GroupStage, limit_s: float, now: float) -> None:
        group.stage = stage
        group.since = now
        group.limit_s = limit_s

    # -------------------------------------------------------------------------------------------------- what is said

    def left(self, record: RankRecord, message: Left, now: float) -> list[Output]:
        """A rank is out of the epoch before. The last one to say so decides who computes in the next."""
        group = self._groups[record.group]
        if group.stage is not GroupStage.LEAVING or record.rank not in group.waiting:
            self._refusals.out_of_order += 1
            return []
        group.waiting.discard(record.rank)
        record.left = message
        record.num_blocks = message.num_blocks or record.num_blocks
        record.epoch = group.epoch
        record.replied = -1
        record.step = record.collective = 0
        record.inside = False
        record.progress_at = now
        return [] if group.waiting else self._compose(group, now)

    def _compose(self, group: GroupRecord, now: float) -> list[Output]:
        replicas = self.replicas(group)
        here = {rank for rank in group.ranks if self._ranks[rank].usable and self._ranks[rank].left is not None}
        whole = [dp_rank for dp_rank, ranks in enumerate(replicas) if here.issuperset(ranks)]
        if not whole or (len(whole) < len(replicas) and not self._may_begin(group)):
            return self._gather(group, "", now)
        group.members = tuple(rank for dp_rank in whole for rank in replicas[dp_rank])
        group.parked = tuple(sorted(here.difference(group.members)))
        refit = plan_refit(self._config, group.id, group.members, group.parked, self._ranks)
        if isinstance(refit, str):
            group.tried = self._processes(group, whole)
            return self._gather(group, refit, now)
        group.refit = refit
        group.tried = frozenset()
        group.waiting_for = ""
        if len(group.members) == 1:
            return self._configure(group, "", 0, now)
        self._stage(group, GroupStage.OPENING_STORE, STORE_S, now)
        config = self._config
        port = config.store_port + group.id if config.store_port else 0
        return self._to(group.members[0], OpenStore(config.term, group.epoch, config.store_host, port))

    def _gather(self, group: GroupRecord, why: str, now: float) -> list[Output]:
        group.stage = GroupStage.GATHERING
        group.members = group.parked = ()
        group.waiting_for = why
        # Who has loaded meanwhile may be what was missing.
        return self.consider(group, now)

    def store_ready(self, record: RankRecord, message: StoreReady, now: float) -> list[Output]:
        """The epoch's store listens: everybody may come to it."""
        group = self._groups[record.group]
        if group.stage is not GroupStage.OPENING_STORE or record.rank != group.members[0]:
            self._refusals.out_of_order += 1
            return []
        return self._configure(group, message.host, message.port, now)

    def _configure(self, group: GroupRecord, store_host: str, store_port: int, now: float) -> list[Output]:
        limit = max(READY_S, self.leave_s(group.id, now))
        if self.starting:
            limit = max(limit, self._config.start_deadline_s)
        self._stage(group, GroupStage.FORMING, limit, now)
        group.waiting = {*group.members, *group.parked}
        refit = group.refit
        if refit is None:
            raise AssertionError(f"group {group.id} is configured without a plan of its experts")
        outputs: list[Output] = []
        for role, ranks in (("compute", group.members), ("parked", group.parked)):
            configure = Configure(
                term=self._config.term,
                epoch=group.epoch,
                role=role,
                members=self._members(group.members),
                store_host=store_host,
                store_port=store_port,
                placement=refit.placement,
                parked=self._members(group.parked),
                slots=refit.slots,
                fetches=refit.fetches,
                nodes=number_hosts([self._ranks[rank].host for rank in group.members]),
            )
            for rank in ranks:
                self._ranks[rank].progress_at = now
                outputs += self._to(rank, configure)
        return outputs

    def _members(self, ranks: Sequence[int]) -> tuple[Member, ...]:
        return tuple(Member(rank, self._ranks[rank].incarnation) for rank in ranks)

    def ready(self, record: RankRecord, message: Ready, now: float) -> list[Output]:
        """A rank has its experts and has met the others. The last one opens the epoch."""
        group = self._groups[record.group]
        if group.stage is not GroupStage.FORMING or record.rank not in group.waiting:
            self._refusals.out_of_order += 1
            return []
        group.waiting.discard(record.rank)
        record.progress_at = now
        record.num_blocks = message.num_blocks or record.num_blocks
        if record.rank in group.members:
            record.state = RankState.READY
        return [] if group.waiting else self._open(group, now)

    def _open(self, group: GroupRecord, now: float) -> list[Output]:
        group.stage = GroupStage.OPEN
        size = self._config.layout.world_size
        first = group.ranks[0]
        serving = tuple((rank - first) // size for rank in group.members[::size])
        replicas = self.replicas(group)
        kept = tuple(dp_rank for dp_rank in serving if self._kept(replicas[dp_rank]))
        blocks = {rank: self._ranks[rank].num_blocks for rank in group.members}
        outputs: list[Output] = [EpochReady(group.id, group.epoch, blocks, serving, kept)]
        outputs += self._tell_open(group, now)
        for rank in group.members:
            self._ranks[rank].computed = self._ranks[rank].incarnation
        group.served = serving
        group.opened = True
        group.fault_at = None
        return outputs + self.consider(group, now)

    def _tell_open(self, group: GroupRecord, now: float) -> list[Output]:
        if not group.opened:
            return []
        told: list[Output] = []
        if group.fault_at is not None:
            seconds = now - group.fault_at
            text = f"group {group.id} computes again as epoch {group.epoch}, {seconds:.3f} s after the fault"
            told.append(Tell(Event("recovered", text, group=group.id, epoch=group.epoch, seconds=seconds)))
        pause = now - group.stood_at
        for rank in group.members:
            record = self._ranks[rank]
            if not record.has_computed:
                text = f"rank {rank} (pid {record.pid}) computes; its group stood still for {pause:.3f} s"
                event = Event("joined", text, rank, group=group.id, epoch=group.epoch, seconds=pause)
                told.append(Tell(event))
        return told

    def _to(self, rank: int, message: ToWorker) -> list[Output]:
        peer = self._ranks[rank].peer
        return [ToPeer(rank, peer, message)] if peer is not None else []
