"""Whether a plan can be carried out: what another process answers is not taken at its word; no I/O."""

from __future__ import annotations

import math

import numpy as np

from drumline.engine.core.balance.places import I64
from drumline.engine.core.balance.plan import PlacementPlan
from drumline.protocol.messages import I32Matrix


def wrong_with(plan: PlacementPlan, standing: I32Matrix, slot_rank: I64, num_experts: int) -> str:
    """Why ``plan`` cannot be carried out from ``standing``, int32 (layers, slots), which has every expert; empty where
    it can. ``slot_rank``: int64 (slots,), the ep rank that has each."""
    placement, moves = plan.placement, plan.moves
    if placement.shape != standing.shape:
        return f"a placement {placement.shape}; valid: {standing.shape}"
    if placement.min() < 0 or placement.max() >= num_experts:
        return f"experts {placement.min()} to {placement.max()}; valid: 0 to {num_experts - 1}"
    held = np.zeros((len(placement), num_experts), dtype=np.bool_)
    held[np.arange(len(placement))[:, None], placement] = True
    if not held.all():
        layer, expert = np.argwhere(~held)[0]
        return f"no slot for expert {expert} of MoE layer {layer}"
    if not all(math.isfinite(number) for number in (plan.balancedness_before, plan.balancedness, plan.solve_ms)):
        return "a balancedness or a time that is no number"
    return _wrong_moves(moves, placement, standing, slot_rank)


def _wrong_moves(moves: I32Matrix, placement: I32Matrix, standing: I32Matrix, slot_rank: I64) -> str:
    layers, slots = standing.shape
    if moves.ndim != 2 or moves.shape[1] != 4:
        return f"moves {moves.shape}; valid: (n, 4)"
    ends = np.array([layers, slots, int(slot_rank.max()) + 1, slots])
    if (moves < 0).any() or (moves >= ends).any():
        return f"a move out of range; valid: below {ends.tolist()}"
    layer, slot, rank, source = moves.T
    if (slot_rank[source] != rank).any():
        return "a copy that its source does not have"
    if (standing[layer, source] != placement[layer, slot]).any():
        return "a move that brings another expert than the placement has"
    changed = np.zeros(standing.shape, dtype=np.int32)
    np.add.at(changed, (layer, slot), 1)
    if (changed != (placement != standing)).any():
        return "moves that do not lead to its placement"
    return ""
