"""Which experts the ranks of a new epoch hold, planned from what they hold now; no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from drumline.engine.core.cover import cover
from drumline.engine.core.fetches import fetches
from drumline.engine.core.slots import choose_slots
from drumline.protocol.layout import Layout, slots_per_rank
from drumline.protocol.messages import I32, NO_FETCHES, NO_NUMBERS, I32Matrix

if TYPE_CHECKING:
    from drumline.engine.core.members import MembershipConfig, RankRecord

NOTHING: I32Matrix = np.zeros((0, 0), dtype=np.int32)
SHARE_OF_FREE = 0.5
"""How much of a host's free memory its ranks may take for experts of lost ranks, where nobody says."""


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """The experts of an epoch, as Configure says them."""

    placement: I32Matrix
    slots: I32
    fetches: I32Matrix


def initial_experts(config: MembershipConfig, group: int, rank: int) -> I32Matrix:
    """What ``rank`` loads at its start, int32 (moe_layers, slots), or (0, 0) where every rank has all experts."""
    placement = config.placements.get(group)
    if placement is None or not config.layout.enable_expert_parallel:
        return NOTHING
    own = _initial_slots(config.layout, placement)
    place = config.layout.ep_rank(rank)
    first = sum(own[:place])
    return np.ascontiguousarray(placement[:, first : first + own[place]])


def _initial_slots(layout: Layout, placement: I32) -> tuple[int, ...]:
    return slots_per_rank(placement.shape[1], layout.ep_size)


def plan_refit(
    config: MembershipConfig, group: int, members: Sequence[int], parked: Sequence[int], ranks: Mapping[int, RankRecord]
) -> Refit | str:
    """The experts of an epoch in which ``members`` compute, the ranks of whole engine replicas, ascending. All of them
    and those ``parked`` have said Left. Returns why it cannot be where the experts do not fit."""
    placement = config.placements.get(group)
    if placement is None:
        return Refit(NOTHING, NO_NUMBERS, NO_FETCHES)
    if not config.layout.enable_expert_parallel:
        text = _too_big_shards(config, members, ranks)
        return text or Refit(placement, NO_NUMBERS, NO_FETCHES)
    layout = config.layout
    stages = ranks_of_stage(layout, members)
    initial = _initial_slots(layout, placement)
    had = [initial[layout.ep_rank(rank)] for rank in stages[0]]
    capacity = [
        min(_capacity(config, ranks[stage[place]], had[place], ranks) for stage in stages) for place in range(len(had))
    ]
    slots = choose_slots(config.num_experts, had, capacity)
    if slots is None:
        return (
            f"{config.num_experts} experts do not fit into the ranks that are left, which have room for "
            f"{sum(capacity)} of them (expert_growth_bytes)"
        )
    everyone = (*members, *parked)
    held = {rank: _held(ranks[rank], len(config.moe_layer_stage)) for rank in everyone}
    spare = {rank: _spare(ranks[rank], len(config.moe_layer_stage)) for rank in everyone}
    joined = [_joined([held[stage[place]] for stage in stages], config.moe_layer_stage) for place in range(len(had))]
    planned = cover(joined, slots, config.num_experts)
    stage_of = {rank: layout.coordinates(rank).pp_rank for rank in held}
    todo = fetches(held, planned, slots, stages, config.moe_layer_stage, stage_of, spare)
    return Refit(planned, np.asarray(slots, dtype=np.int32), todo)


def ranks_of_stage(layout: Layout, members: Sequence[int]) -> list[list[int]]:
    """The members of each stage by their place among those that hold its experts."""
    stages: list[list[int]] = [[] for _ in range(layout.pipeline_parallel_size)]
    for rank in members:
        stages[layout.coordinates(rank).pp_rank].append(rank)
    return stages


def _held(record: RankRecord, layers: int) -> I32:
    left = record.left
    if left is None or left.held.shape[0] != layers:
        return np.zeros((layers, 0), dtype=np.int32)
    return left.held[:, : left.held.shape[1] - left.spare]


def _spare(record: RankRecord, layers: int) -> I32:
    """What the rank holds outside of its slots: int32 (layers, any number)."""
    left = record.left
    if left is None or left.held.shape[0] != layers:
        return np.zeros((layers, 0), dtype=np.int32)
    return left.held[:, left.held.shape[1] - left.spare :]


def _joined(of_stages: Sequence[I32], layer_stage: Sequence[int]) -> I32:
    """What the ranks of one place hold between them, each the layers of its own stage."""
    if len(of_stages) == 1:
        return of_stages[0]
    width = max(one.shape[1] for one in of_stages)
    joined = np.full((len(layer_stage), width), -1, dtype=np.int32)
    for layer, stage in enumerate(layer_stage):
        own = of_stages[stage][layer]
        joined[layer, : len(own)] = own
    return joined


def _growth(config: MembershipConfig, record: RankRecord, most: int, ranks: Mapping[int, RankRecord]) -> int:
    """How many more bytes the rank may take, of the ``most`` that it can need."""
    if config.expert_growth_bytes is not None:
        return min(config.expert_growth_bytes, most)
    if record.loaded is not None and record.loaded.device.startswith("cuda"):
        return 0
    neighbours = Counter(one.host for one in ranks.values() if one.usable)[record.host]
    free = record.left.free_bytes if record.left is not None else 0
    return min(int(free * SHARE_OF_FREE / max(neighbours, 1)), most)


def _slot_bytes(config: MembershipConfig, rank: int) -> int:
    stage = config.layout.coordinates(rank).pp_rank
    return config.expert_slot_bytes[stage] if stage < len(config.expert_slot_bytes) else 0


def _capacity(config: MembershipConfig, record: RankRecord, had: int, ranks: Mapping[int, RankRecord]) -> int:
    """How many slots the rank can have. What it has grown by already is no longer free memory."""
    bytes_per_slot = _slot_bytes(config, record.rank)
    if bytes_per_slot == 0:
        return config.num_experts
    grown = had
    if config.expert_growth_bytes is None and record.left is not None:
        grown = max(had, record.left.held.shape[1] - record.left.spare)
    return grown + _growth(config, record, bytes_per_slot * config.num_experts, ranks) // bytes_per_slot


def _too_big_shards(config: MembershipConfig, members: Sequence[int], ranks: Mapping[int, RankRecord]) -> str:
    """Why the shards of experts cannot be cut anew for so few ranks; empty where they can."""
    layout = config.layout
    first, sharers = layout.expert_group_size, len(members) // layout.pipeline_parallel_size
    for rank in members:
        every = _slot_bytes(config, rank) * config.num_experts
        more = every // sharers - every // first
        room = _growth(config, ranks[rank], every, ranks)
        if more > room:
            return f"rank {rank} would need {more} bytes more for its shards of experts, and may take {room}"
    return ""
