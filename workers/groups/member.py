"""A rank as a member of a group: who the others are, what they share, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from drumline.protocol.errors import DrumlineError, ProtocolError
from drumline.workers.groups.forming import Formed
from drumline.workers.groups.gloo_ops import GlooOps
from drumline.workers.groups.local_ops import LocalOps
from drumline.workers.groups.nccl_ops import NcclOps
from drumline.workers.groups.outboxes import Outboxes
from drumline.workers.groups.shared_ops import SharedOps
from drumline.workers.groups.sockets import Sockets
from drumline.workers.groups.transfers import Transfers
from drumline.workers.groups.watch import Watch

HostOps = SharedOps | GlooOps | LocalOps
Ops = HostOps | NcclOps


class GroupMember:
    """What a :class:`drumline.workers.groups.GroupCoordinator` is apart from its operations."""

    def __init__(self, formed: Formed | None, watch: Watch, *, connect: bool) -> None:
        place = watch.place
        self.name = watch.name
        self.ranks = place.members
        self.rank = place.rank
        self.rank_in_group = self.position = place.position
        self.world_size = self.size = place.size
        self.device = place.device
        self.first_rank, self.last_rank = self.ranks[0], self.ranks[-1]
        self.next_rank = self.ranks[(self.position + 1) % self.size]
        self.prev_rank = self.ranks[self.position - 1]
        self.is_first_rank = self.rank == self.first_rank
        self.is_last_rank = self.rank == self.last_rank
        self._watch = watch
        self._sees = formed.sees if formed else [[True]]
        self.node_count = _count_nodes(self._sees)
        self._boxes = formed.mailboxes if formed else None
        self.mailboxes = self._boxes if self.device.type == "cpu" else None
        self._nccl = self._choose_nccl(formed)
        self._carrier: Outboxes | Sockets | None = None
        self._transfers: Transfers | None = None
        # Connecting waits for all ranks: not for when two of them have a message.
        self._may_transfer = connect
        self._cpu_ops: HostOps = self._choose_ops(formed) if formed else LocalOps()
        self._device_ops: Ops = self._nccl or self._cpu_ops

    def _choose_nccl(self, formed: Formed | None) -> NcclOps | None:
        if formed is None or formed.nccl is None:
            return None
        return NcclOps(formed.nccl, self._watch, self.position, self.size)

    def _choose_ops(self, formed: Formed) -> HostOps:
        ops: HostOps
        if formed.mailboxes is not None:
            self._carrier = Outboxes(formed.mailboxes, self._watch)
            ops = SharedOps(formed.mailboxes, self.size)
        else:
            self._carrier = sockets = Sockets(formed, self._watch)
            ops = GlooOps(sockets, self.position, self.size)
        self._transfers = Transfers(self._watch, self._carrier, self._nccl)
        return ops

    def in_the_same_node_as(self, src: int) -> list[bool]:
        """Per position, whether that rank is on the host of global rank ``src``, as far as shared memory tells."""
        position = self._position_of("src", src)
        return [self._sees[other][position] for other in range(self.size)]

    def collective(self) -> AbstractContextManager[None]:
        """Around anything that waits for other ranks: keeps the progress record, refuses an epoch that is over."""
        return self._watch

    def check_epoch(self) -> None:
        """Raises EpochAborted when the epoch is over or the group is closed."""
        self._watch.check()

    def check_counts(self, counts: Sequence[int], own: int) -> None:
        """Raises ProtocolError when a step's token counts do not fit the group, of which this rank has ``own``."""
        if len(counts) != self.size or counts[self.position] != own:
            raise ProtocolError(
                f"rank {self.position} of {self.size} brings {own} tokens; the step's counts are {list(counts)}"
            )

    def error(self, kind: type[DrumlineError], text: str) -> DrumlineError:
        """An error of the collective that this rank is in. The group is of no use from here on."""
        return self._watch.error(kind, text)

    def close(self) -> None:
        """Give the group up. Never blocks, whatever is pending.

        Messages that are being sent still go out for up to two seconds, unless an operation of the group has failed.
        """
        if self._watch.closed:
            return
        self._watch.closed = True
        if self._boxes is not None:
            self._boxes.leave()
        if self._carrier is not None:
            self._carrier.close()
        if self._nccl is not None:
            self._nccl.close()

    def abort(self) -> None:
        """Give the group up with all that is under way: every rank that waits for this one fails at once."""
        self._watch.failed = True
        self.close()

    def _ops(self, tensor: Tensor) -> Ops:
        return self._cpu_ops if tensor.device.type == "cpu" else self._device_ops

    def _position_of(self, field: str, rank: int) -> int:
        if rank not in self.ranks:
            raise ProtocolError(f"{field}: found rank {rank}; valid: {self._named(self.ranks)} of group {self.name}")
        return self.ranks.index(rank)

    def _transfer(self, field: str, rank: int) -> Transfers:
        """For messages to or from ``rank``."""
        if self._position_of(field, rank) == self.position or self._transfers is None:
            others = [other for other in self.ranks if other != self.rank]
            raise ProtocolError(f"{field}: found this rank, {rank}; valid: {self._named(others)} of group {self.name}")
        if not self._may_transfer:
            raise ProtocolError(f"connect: found False for group {self.name}; valid: True, for messages of two ranks")
        return self._transfers

    @staticmethod
    def _named(ranks: Sequence[int]) -> str:
        return ", ".join(map(str, ranks)) if ranks else "none"


def _count_nodes(sees: Sequence[Sequence[bool]]) -> int:
    """How many sets of ranks there are that see each other's memory."""
    left, nodes = set(range(len(sees))), 0
    while left:
        first = min(left)
        left -= {first, *(other for other in left if sees[other][first])}
        nodes += 1
    return nodes
