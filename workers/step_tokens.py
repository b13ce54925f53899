"""Which tokens of a step are whose: shares of ranks, replicas and gathered batches. All of it follows from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drumline.protocol.layout import Layout
from drumline.protocol.padding import GatherPlan, gather_plan, slice_counts
from drumline.protocol.shards import Span, split


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Where a rank's attention replica stands. ``replica``: its index in a step's token counts. ``first``: the index of
    the first attention replica of its engine replica."""

    replica: int = 0
    first: int = 0
    attn_rank: int = 0
    attn_dp: int = 1
    attn_tp: int = 1
    attn_tp_rank: int = 0

    @classmethod
    def of(cls, layout: Layout, rank: int, *, lockstep: bool) -> ReplicaPlace:
        """The place of ``rank``. ``lockstep``: all engine replicas step together; else each alone."""
        at = layout.coordinates(rank)
        attn_dp = layout.attention_data_parallel_size
        first = at.dp_rank * attn_dp if lockstep else 0
        return cls(first + at.attn_rank, first, at.attn_rank, attn_dp, layout.attn_tp_size, at.attn_tp_rank)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Token counts of one step. The ranks of an attention replica hold the same tokens during attention and share them
    out between them in experts and gathered networks, so that no token is computed twice there.

    ``counts``: of every replica. ``own``: of this replica. ``share``: this rank's share of them, a range. ``shares``:
    how many each rank of this replica has. ``by_rank``: shares of all ranks of the expert group. ``gathered``: how the
    tokens of this engine replica's attention replicas are laid out for a network that its tp ranks share; None where
    there is one attention replica. ``step``: the number of the step.
    """

    counts: Sequence[int]
    own: int
    share: Span
    shares: Sequence[int]
    by_rank: Sequence[int]
    gathered: GatherPlan | None
    step: int = 0

    @classmethod
    def of(cls, counts: Sequence[int], place: ReplicaPlace, step: int = 0) -> StepTokens:
        """What the plan's ``counts`` mean for the rank at ``place``."""
        own = counts[place.replica]
        gathered = None
        if place.attn_dp > 1:
            mine = counts[place.first : place.first + place.attn_dp]
            gathered = gather_plan(slice_counts(mine, place.attn_tp))
        return cls(
            counts=counts,
            own=own,
            share=split(own, place.attn_tp, place.attn_tp_rank),
            shares=slice_counts([own], place.attn_tp),
            by_rank=slice_counts(counts, place.attn_tp),
            gathered=gathered,
            step=step,
        )
