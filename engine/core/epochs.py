"""How the epoch of a lockstep group forms: messages in, messages out; no I/O.

``OpenStore`` to its first rank when there is more than one, ``StoreReady``, ``Configure`` to all, ``Ready`` from all
with the digest that each computed of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from drumline.engine.core.evidence import Evidence
from drumline.engine.core.members import (
    EpochReady,
    GroupRecord,
    GroupStage,
    Loading,
    MembershipConfig,
    Output,
    RankRecord,
    RankState,
    Refusals,
    ToPeer,
)
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Configure, Member, OpenStore, Ready, StoreReady, ToWorker


class Epochs:
    """The epochs of all groups. Shares its records with :class:`~drumline.engine.core.membership.Membership`, which
    checks who speaks."""

    def __init__(
        self,
        config: MembershipConfig,
        groups: Sequence[GroupRecord],
        ranks: Mapping[int, RankRecord],
        evidence: Evidence,
        refusals: Refusals,
    ) -> None:
        self._config = config
        self._groups = groups
        self._ranks = ranks
        self._evidence = evidence
        self._refusals = refusals

    def begin(self, group_id: int, now: float) -> list[Output]:
        """Form the next epoch of a group whose ranks are all there."""
        group = self._groups[group_id]
        group.epoch += 1
        for rank in group.ranks:
            record = self._ranks[rank]
            record.state = RankState.STARTING
            record.ready = None
            record.replied = -1
            record.step = record.collective = 0
            record.inside = False
            record.progress_at = now
        if len(group.ranks) == 1:
            return self._configure(group, "", 0)
        group.stage = GroupStage.OPENING_STORE
        config = self._config
        port = config.store_port + group_id if config.store_port else 0
        return self._to(group.ranks[0], OpenStore(config.term, group.epoch, config.store_host, port))

    def store_ready(self, record: RankRecord, message: StoreReady, now: float) -> list[Output]:
        """The epoch's store listens: everybody may come to it."""
        group = self._groups[record.group]
        if group.stage is not GroupStage.OPENING_STORE or record.rank != group.ranks[0]:
            self._refusals.out_of_order += 1
            return []
        for rank in group.ranks:
            self._ranks[rank].progress_at = now
        return self._configure(group, message.host, message.port)

    def ready(self, record: RankRecord, message: Ready, now: float) -> list[Output]:
        """A rank has loaded and met the others. One that is ready for something else is lost."""
        group = self._groups[record.group]
        if group.stage is not GroupStage.FORMING or record.state is not RankState.STARTING:
            self._refusals.out_of_order += 1
            return []
        record.progress_at = now
        wrong = self._wrong(message)
        if wrong:
            text = f"rank {record.rank} {wrong}"
            self._evidence.final(record.rank, ErrorInfo(kind="protocol", text=text, rank=record.rank), now)
            return []
        record.ready = message
        record.state = RankState.READY
        outputs: list[Output] = []
        loaded = message.weight_bytes
        if (record.load_done, record.load_total) != (loaded, loaded):
            # A load between two beats is told too.
            record.load_done = record.load_total = loaded
            outputs.append(Loading(record.rank, loaded, loaded))
        ready = [self._ranks[rank].ready for rank in group.ranks]
        blocks = tuple(one.num_blocks for one in ready if one is not None)
        if len(blocks) == len(group.ranks):
            group.stage = GroupStage.OPEN
            outputs.append(EpochReady(group.id, group.epoch, blocks))
        return outputs

    def _wrong(self, message: Ready) -> str:
        if message.digest != self._config.digest:
            return f"computed config digest {message.digest}, the coordinator {self._config.digest}"
        if message.num_blocks < 1:
            return f"is ready with {message.num_blocks} KV blocks; at least 1 is needed"
        return ""

    def _configure(self, group: GroupRecord, store_host: str, store_port: int) -> list[Output]:
        group.stage = GroupStage.FORMING
        members = tuple(Member(rank, self._ranks[rank].incarnation) for rank in group.ranks)
        placement = self._config.placements.get(group.id)
        if placement is None:
            placement = np.zeros((0, 0), dtype=np.int32)
        configure = Configure(
            term=self._config.term,
            epoch=group.epoch,
            role="compute",
            members=members,
            store_host=store_host,
            store_port=store_port,
            placement=placement,
        )
        return [output for rank in group.ranks for output in self._to(rank, configure)]

    def _to(self, rank: int, message: ToWorker) -> list[Output]:
        peer = self._ranks[rank].peer
        return [ToPeer(rank, peer, message)] if peer is not None else []
