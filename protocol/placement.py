"""Which logical expert each physical slot holds, and the maps that follow from it. numpy only.

A placement is int32 (moe_layers, physical slots); slots are numbered rank by rank, each rank's own contiguous, as many
as :func:`~drumline.protocol.layout.slots_per_rank` gives it, or as is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import PLACEMENT_STRATEGIES, slots_per_rank

I32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


def initial_placement(
    num_moe_layers: int, num_experts: int, ep_size: int, strategy: str = "linear", num_redundant: int = 0
) -> I32:
    """The placement that a model starts with, int32 (num_moe_layers, num_experts + num_redundant): a slot for each
    expert, then one more for each of the first ``num_redundant``, in the same order and, if there are so many, again.

    ``linear`` has the experts in ascending order, so that rank 0 has the first ones, rank 1 the next, and so on;
    ``round_robin`` gives rank r the experts r, r + ep_size, r + 2 * ep_size... as long as there are no more slots than
    experts. The first ranks have one slot more where they cannot all have as many. No rank has two copies of an expert.
    Raises InvalidConfig.
    """
    if num_moe_layers < 0:
        raise InvalidConfig("num_moe_layers", num_moe_layers, "a whole number from 0")
    if not 1 <= ep_size <= max(num_experts, 1):
        raise InvalidConfig("ep_size", ep_size, f"1 to {num_experts} (each rank needs an expert)")
    most = num_experts * (ep_size - 1)
    if not 0 <= num_redundant <= most:
        valid = f"0 to {most}: {num_experts} experts have at most one copy on each of {ep_size} ranks"
        raise InvalidConfig("num_redundant_experts", num_redundant, valid)
    if strategy == "linear":
        layer = np.arange(num_experts, dtype=np.int32)
    elif strategy == "round_robin":
        layer = np.concatenate([np.arange(r, num_experts, ep_size, dtype=np.int32) for r in range(ep_size)])
    else:
        raise InvalidConfig("expert_placement_strategy", strategy, "one of " + ", ".join(PLACEMENT_STRATEGIES))
    # Whatever num_experts neighbours of this are, they are all different.
    layer = np.resize(layer, num_experts + num_redundant)
    return np.ascontiguousarray(np.broadcast_to(layer, (num_moe_layers, len(layer))))


class PlacementMaps(msgspec.Struct, frozen=True, eq=False):
    """A placement and what follows from it; all arrays int32 and read-only.

    ``physical_to_logical`` (layers, slots); ``logical_to_physical`` (layers, experts, most copies), the slots that hold
    an expert, ascending, padded with -1; ``logical_replica_count`` (layers, experts); ``slot_rank`` (slots,), the ep
    rank that owns each slot; ``rank_offsets`` (ep_size + 1,), rank r owns slots rank_offsets[r] to rank_offsets[r + 1].
    """

    physical_to_logical: I32
    logical_to_physical: I32
    logical_replica_count: I32
    slot_rank: I32
    rank_offsets: I32

    @classmethod
    def build(
        cls, physical_to_logical: I32, num_experts: int, ep_size: int, slots: Sequence[int] | I32 = ()
    ) -> PlacementMaps:
        """Check a placement and derive its maps. ``slots``: how many each ep rank has; none: shared out evenly.

        Raises InvalidConfig when an entry is not an expert or a layer lacks one, naming layer and expert, and when
        ``slots`` do not add up.
        """
        placement = np.asarray(physical_to_logical)
        if placement.ndim != 2 or not np.issubdtype(placement.dtype, np.integer):
            raise InvalidConfig("placement", f"{placement.dtype} {placement.shape}", "int32 (moe layers, slots)")
        _check_experts(placement, num_experts)
        placement = placement.astype(np.int32)
        layers, num_slots = placement.shape
        share = _check_slots(num_slots, ep_size, slots)
        counts = np.zeros((layers, num_experts), dtype=np.int32)
        layer_index = np.repeat(np.arange(layers), num_slots)
        np.add.at(counts, (layer_index, placement.ravel()), 1)
        if counts.size and counts.min() == 0:
            layer, expert = np.argwhere(counts == 0)[0]
            raise InvalidConfig("placement", f"no slot for expert {expert} of MoE layer {layer}", "one or more")

        # Stable: the copies of an expert stand in slot order. The n-th of each run is its n-th copy.
        order = np.argsort(placement, axis=1, kind="stable")
        experts = np.take_along_axis(placement, order, axis=1)
        first = np.cumsum(counts, axis=1) - counts
        copy = np.arange(num_slots)[None, :] - np.take_along_axis(first, experts, axis=1) if num_slots else order
        logical = np.full((layers, num_experts, int(counts.max(initial=1))), -1, dtype=np.int32)
        logical[layer_index, experts.ravel(), copy.ravel()] = order.ravel()

        offsets = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(share, dtype=np.int32)])
        slot_rank = np.repeat(np.arange(ep_size, dtype=np.int32), share)
        maps = cls(placement, logical, counts, slot_rank, offsets)
        for array in (placement, logical, counts, slot_rank, offsets):
            array.setflags(write=False)
        return maps

    @property
    def num_slots(self) -> int:
        """Physical slots of each layer, over all ranks."""
        return int(self.slot_rank.shape[0])

    def local_slots(self, ep_rank: int) -> range:
        """The physical slots that ``ep_rank`` owns."""
        return range(int(self.rank_offsets[ep_rank]), int(self.rank_offsets[ep_rank + 1]))


def _check_slots(num_slots: int, ep_size: int, slots: Sequence[int] | I32) -> I32:
    """How many slots each ep rank has, int32 (ep_size,)."""
    if not len(slots):
        return np.array(slots_per_rank(num_slots, ep_size), dtype=np.int32)
    share = np.array(slots, dtype=np.int32)
    if len(share) != ep_size or share.min() < 0 or int(share.sum()) != num_slots:
        raise InvalidConfig("slots", share.tolist(), f"{ep_size} numbers from 0 that add up to {num_slots}")
    return share


def _check_experts(placement: np.ndarray[Any, np.dtype[Any]], num_experts: int) -> None:
    wrong = (placement < 0) | (placement >= num_experts)
    if wrong.any():
        layer, slot = np.argwhere(wrong)[0]
        found = f"expert {placement[layer, slot]} in slot {slot} of MoE layer {layer}"
        raise InvalidConfig("placement", found, f"0 to {num_experts - 1}")
