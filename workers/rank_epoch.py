"""A rank's way out of one epoch and into the next: its store, its groups, its experts in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Configure, Member, OpenStore, StoreReady, WorkerConfig
from drumline.protocol.stateless import open_store
from drumline.workers.control import Control
from drumline.workers.epoch_groups import EpochGroups
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.rank_experts import nodes_of_stage
from drumline.workers.fence import Fence
from drumline.workers.groups import GroupCoordinator, GroupPlace, form_group

if TYPE_CHECKING:
    from drumline.workers.model_runner import ModelRunner

log = logging.getLogger(__name__)

STORE_DEADLINE_S = 30.0


class RankEpoch:
    """The epoch that a rank is in, at most one at a time. ``groups`` is None outside of any."""

    def __init__(self, control: Control) -> None:
        self.fence = Fence()
        self.groups: EpochGroups | None = None
        self._control = control
        self._me = control.identity
        self._shuffle: GroupCoordinator | None = None
        self._store: object = None
        self._store_of = (-1, -1)

    def open_store(self, message: OpenStore) -> None:
        """Open the epoch's store and say where it listens; nothing for an epoch that is over."""
        if self.fence.is_stale(message.term, message.epoch):
            return
        if (message.term, message.epoch) == self._store_of:
            self.fence.stale += 1  # the members meet at the one that is open
            return
        self._store_of = (message.term, message.epoch)
        self._store = None  # a fixed port is free for the new store once the old one is gone
        self._store, host, port = open_store(message.host, message.port, STORE_DEADLINE_S)
        self._control.send(StoreReady(message.term, message.epoch, self._me.rank, host, port))

    def enter(self, message: Configure, config: WorkerConfig, runner: ModelRunner, begins: Callable[[], None]) -> bool:
        """Bring the experts into place and meet the other members. False for an epoch that is over. ``begins`` is
        called once this rank is known to be in it.

        Raises ProtocolError for an order that does not fit, EpochAborted, PeerLost, GroupTimeout, StoreError.
        """
        if not self.fence.enter(message.term, message.epoch):
            return False
        self.leave(runner)  # the epoch is broken until it is formed
        self._control.progress.enter_epoch(message.term, message.epoch)
        self._check_members(message)
        place = EpochPlace.of(config.layout, [member.rank for member in message.members], self._me.rank)
        if place.parked != (message.role == "parked"):
            raise ProtocolError(f"role {message.role} for rank {self._me.rank}; members: {list(place.ranks)}")
        self._control.progress.begin_forming()
        begins()
        runner.reset()
        placement = np.array(message.placement, dtype=np.int32)
        moving = runner.experts.moving_ranks(place, placement, message.slots, message.fetches)
        transfer = self._transfer_group(message, config, runner, moving)
        try:
            runner.refit(place, placement, message.slots, message.fetches, transfer, self.check, message.nodes)
            self._form_groups(message, config, runner, place)
            self._open_shuffler(message, config, runner, place)
        finally:
            if transfer is not None:
                transfer.close()
        self.fence.broken = False
        return True

    def check(self) -> None:
        """Raises EpochAborted once a newer epoch has been ordered."""
        self._control.abort.check(self.fence.term, self.fence.epoch)

    def _check_members(self, message: Configure) -> None:
        """Raises ProtocolError unless this incarnation of the rank is in the epoch."""
        everyone = (*message.members, *message.parked)
        if Member(self._me.rank, self._me.incarnation) not in everyone:
            members = ", ".join(f"{member.rank}/{member.incarnation}" for member in everyone)
            me = f"{self._me.rank}/{self._me.incarnation}"
            raise ProtocolError(f"{me} is no member of the epoch; members: {members}")

    def _transfer_group(
        self, message: Configure, config: WorkerConfig, runner: ModelRunner, moving: frozenset[int]
    ) -> GroupCoordinator | None:
        """The ranks that give experts to each other, ``moving``; None when this one neither gives nor gets any.

        Each stage moves its own layers, so the ranks of one stage meet apart from those of others.
        """
        stage = config.layout.coordinates(self._me.rank).pp_rank
        if self._me.rank not in moving:
            return None
        strangers = moving - {member.rank for member in (*message.members, *message.parked)}
        if strangers:
            raise ProtocolError(f"fetches name ranks {sorted(strangers)}, which are not in the epoch")
        return self._form(f"transfer.{stage}", tuple(sorted(moving)), True, message, config, runner)

    def _form(
        self,
        name: str,
        ranks: tuple[int, ...],
        connect: bool,
        message: Configure,
        config: WorkerConfig,
        runner: ModelRunner,
    ) -> GroupCoordinator:
        host, port = message.store_host, message.store_port
        place = GroupPlace(message.term, message.epoch, self._me.rank, ranks, host, port, runner.device)
        return form_group(
            name,
            place,
            self._control.abort,
            self._control.progress,
            connect=connect,
            collective_deadline_s=config.distributed_timeout_s,
        )

    def _form_groups(self, message: Configure, config: WorkerConfig, runner: ModelRunner, place: EpochPlace) -> None:
        self.groups = groups = EpochGroups(
            place,
            self._me.rank,
            lockstep=runner.spec.is_moe,
            all2all_backend=config.all2all_backend,
            form=lambda name, ranks, connect: self._form(name, ranks, connect, message, config, runner),
        )
        runner.meet(groups.for_steps())
        sizes = ", ".join(f"{group.name} {group.world_size}" for group in groups if group.world_size > 1)
        log.info("rank %d, epoch %d: groups %s", self._me.rank, message.epoch, sizes or "of one rank alone")

    def _open_shuffler(self, message: Configure, config: WorkerConfig, runner: ModelRunner, place: EpochPlace) -> None:
        """Have experts move between the ranks of this stage that compute, over a group of their own."""
        shuffler = runner.experts.shuffler
        if shuffler is None or place.parked:
            return
        stage = place.world_ranks(place.layout.expert_group(place.rank))
        group = None
        if len(stage) > 1:
            name = f"shuffle.{config.layout.coordinates(self._me.rank).pp_rank}"
            self._shuffle = group = self._form(name, stage, True, message, config, runner)
        shuffler.open(place, message.slots.tolist(), nodes_of_stage(place, message.nodes), group)

    def leave(self, runner: ModelRunner | None) -> None:
        """Give up the groups and refuse what is left of the epoch. Never blocks."""
        self.fence.break_epoch()
        self._control.progress.leave_epoch()
        if runner is not None:
            runner.part()  # buffers given to a collective are never used again
        for group in (self.groups, self._shuffle):
            if group is not None:
                group.close()
        self.groups = self._shuffle = None
