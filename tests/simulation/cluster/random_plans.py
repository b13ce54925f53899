"""Placements and plans that are valid and otherwise at random, for who wants every shuffle that can be."""

from __future__ import annotations

import random

import numpy as np

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.protocol.messages import I32, NO_FETCHES, I32Matrix


def random_placement(placement: I32Matrix, slots: I32, chance: random.Random) -> I32Matrix:
    """Other experts in some slots of some layers: every expert has a copy, no rank two of one."""
    bounds = np.concatenate([[0], np.cumsum(slots)]).tolist()
    owner = np.repeat(np.arange(len(slots)), slots).tolist()
    changed = placement.copy()
    for row in changed:
        if chance.random() < 0.3:
            continue
        for _ in range(chance.choice((1, 2, 4, 8))):
            _change(row, bounds, owner, chance)
    return changed


def _change(row: I32, bounds: list[int], owner: list[int], chance: random.Random) -> None:
    """Two slots change places, or a slot gets a copy of another expert."""
    one, other = chance.randrange(len(row)), chance.randrange(len(row))
    mine, theirs = int(row[one]), int(row[other])
    holders = [_of_rank(row, bounds, owner[slot]) for slot in (one, other)]
    if chance.random() < 0.5:
        if owner[one] == owner[other] or (theirs not in holders[0] and mine not in holders[1]):
            row[one], row[other] = theirs, mine
    elif np.count_nonzero(row == mine) > 1 and theirs not in holders[0]:
        row[one] = theirs


def _of_rank(row: I32, bounds: list[int], rank: int) -> list[int]:
    experts: list[int] = row[bounds[rank] : bounds[rank + 1]].tolist()
    return experts


def has_two_on_a_rank(placement: I32Matrix, slots: I32) -> bool:
    """Whether a rank holds an expert twice in a layer."""
    bounds = np.concatenate([[0], np.cumsum(slots)]).tolist()
    return any(
        len(set(own := _of_rank(row, bounds, rank))) < len(own) for row in placement for rank in range(len(slots))
    )


def random_plan(request: PlanRequest, chance: random.Random) -> PlacementPlan:
    """An answer to ``request``: its target, or anything."""
    target = request.target if len(request.target) else random_placement(request.placement, request.slots, chance)
    if len(request.target) and has_two_on_a_rank(target, request.slots):
        return PlacementPlan(request.number, request.placement, error="two copies of an expert on a rank")
    moves = moves_to(request.placement, target, request.slots, chance)
    return PlacementPlan(
        request.number, target, moves, slots_moved=len(moves), balancedness=0.9, reason="any placement will do"
    )


def moves_to(placement: I32Matrix, target: I32Matrix, slots: I32, chance: random.Random) -> I32Matrix:
    """int32 (n, 4) as in PlacementPlan; an expert that the rank has already comes from there."""
    owner = np.repeat(np.arange(len(slots)), slots)
    moves: list[tuple[int, int, int, int]] = []
    for layer, slot in np.argwhere(placement != target).tolist():
        copies = np.flatnonzero(placement[layer] == target[layer, slot]).tolist()
        own = [copy for copy in copies if owner[copy] == owner[slot]]
        source = chance.choice(own or copies)
        moves.append((layer, slot, int(owner[source]), source))
    return np.asarray(moves, dtype=np.int32).reshape(-1, 4) if moves else NO_FETCHES
