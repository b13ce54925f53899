"""Where a rank stands in an epoch: the world of its members, and its place there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from drumline.protocol.errors import ProtocolError
from drumline.protocol.layout import Layout

PARKED = -1


@dataclass(frozen=True, slots=True)
class EpochPlace:
    """``layout``: the layout that the epoch's members make, whole engine replicas, as many as there are. ``rank``: this
    rank's place among them, its rank in that layout; -1 when it is parked. ``ranks``: the members, ascending, as they
    are numbered in the whole world."""

    layout: Layout
    rank: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, world: Layout, members: Sequence[int], me: int) -> EpochPlace:
        """The place of rank ``me`` of ``world`` in an epoch of ``members``, both as numbered in the whole world.

        Raises ProtocolError when the members are not whole engine replicas of ``world``.
        """
        ranks = tuple(sorted(members))
        replicas = sorted({world.coordinates(rank).dp_rank for rank in ranks})
        if not ranks or ranks != tuple(rank for replica in replicas for rank in world.replica_ranks(replica)):
            raise ProtocolError(f"members {list(members)} are not whole engine replicas of {world.world_size} ranks")
        layout = msgspec.structs.replace(world, data_parallel_size=len(replicas))
        return cls(layout, ranks.index(me) if me in ranks else PARKED, ranks)

    @property
    def parked(self) -> bool:
        """Whether the rank keeps its weights and computes nothing."""
        return self.rank == PARKED

    def world_ranks(self, places: Sequence[int]) -> tuple[int, ...]:
        """The members at ``places``, as numbered in the whole world."""
        return tuple(self.ranks[place] for place in places)
