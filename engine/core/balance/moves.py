"""From one placement to another: which slots stay, and where the experts of the others come from."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from drumline.protocol.messages import I32, NO_FETCHES, I32Matrix

I64: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def keep_in_place(standing: I32Matrix, wanted: I32Matrix, slot_rank: I32) -> I32Matrix:
    """``wanted`` with the slots of each rank in such an order that an expert which ``standing`` has on the rank too
    stays in its slot. int32 (layers, slots) each; ``slot_rank`` (slots,), ascending."""
    layers, slots = standing.shape
    old, new = _copy_keys(standing, slot_rank), _copy_keys(wanted, slot_rank)
    order = np.argsort(old)
    found = order[np.minimum(np.searchsorted(old, new, sorter=order), len(old) - 1)] if len(old) else order
    stays = old[found] == new
    kept = np.full(layers * slots, -1, dtype=np.int32)
    flat = wanted.ravel()
    kept[found[stays]] = flat[stays]
    free = np.ones(layers * slots, dtype=np.bool_)
    free[found[stays]] = False
    # As many slots of a rank are free as experts come to it, and both stand rank by rank.
    kept[free] = flat[~stays]
    return kept.reshape(layers, slots)


def _copy_keys(placement: I32Matrix, slot_rank: I32) -> I64:
    """A number for each slot that no other slot has: of its layer, rank, expert, and which copy of it on the rank."""
    layers, slots = placement.shape
    experts, ranks = int(placement.max(initial=0)) + 2, int(slot_rank.max(initial=0)) + 1
    layer = np.repeat(np.arange(layers, dtype=np.int64), slots)
    key = (layer * ranks + np.tile(slot_rank, layers)) * max(experts, 1 << 20) + placement.ravel() + 1
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    index = np.arange(len(key))
    starts = np.ones(len(key), dtype=np.bool_)
    starts[1:] = ordered[1:] != ordered[:-1]
    nth = np.empty_like(key)
    nth[order] = index - np.maximum.accumulate(np.where(starts, index, 0))
    return key * (slots + 1) + nth


def moves_between(standing: I32Matrix, wanted: I32Matrix, slot_rank: I32, nodes: I32, num_experts: int) -> I32Matrix:
    """int32 (n, 4): layer, slot, source rank and its slot, for each slot that gets another expert, by layer.

    ``slot_rank``: int32 (slots,), -1 for the slots of dead ranks; ``nodes``: int32 (ranks,). The source is the rank
    itself where it has the expert, else one of its node, else another; where there are several they take turns. -1
    twice where no live rank has it: from the checkpoint.
    """
    layer, slot = np.nonzero((standing != wanted) & (wanted >= 0) & (slot_rank >= 0))
    if not len(layer):
        return NO_FETCHES
    expert = wanted[layer, slot]
    holders = _holders(standing, slot_rank, num_experts)[layer, expert]
    receiver = slot_rank[slot][:, None]
    source = slot_rank[holders]
    distance = np.where(source == receiver, 0, np.where(nodes[source] == nodes[receiver], 1, 2))
    turn = (np.arange(holders.shape[1])[None, :] - slot[:, None]) % holders.shape[1]
    cost = np.where(holders < 0, 3, distance) * holders.shape[1] + turn
    chosen = holders[np.arange(len(layer)), cost.argmin(axis=1)]
    rank = np.where(chosen < 0, -1, slot_rank[chosen])
    return np.stack([layer, slot, rank, chosen], axis=1).astype(np.int32)


def _holders(standing: I32Matrix, slot_rank: I32, num_experts: int) -> I64:
    """int64 (layers, experts, most copies): the live slots that hold each expert, -1 where there are no more."""
    layers = len(standing)
    layer, slot = np.nonzero((standing >= 0) & (slot_rank >= 0))
    key = layer * num_experts + standing[layer, slot]
    order = np.argsort(key, kind="stable")
    count = np.bincount(key, minlength=layers * num_experts)
    first = np.cumsum(count) - count
    holders = np.full((layers * num_experts, max(int(count.max(initial=0)), 1)), -1, dtype=np.int64)
    holders[key[order], np.arange(len(key)) - first[key[order]]] = slot[order]
    return holders.reshape(layers, num_experts, -1)


def between_ranks(moves: I32Matrix, slot_rank: I32, nodes: I32) -> tuple[int, int]:
    """How many moves go from rank to rank, and how many of those from node to node."""
    receiver, source = slot_rank[moves[:, 1]], moves[:, 2]
    travel = (source != receiver) & (source >= 0)
    return int(travel.sum()), int((travel & (nodes[source] != nodes[receiver])).sum())
