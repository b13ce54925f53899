"""From where each rank gets the experts that a placement wants in its slots and that are not there; numpy, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from drumline.protocol.messages import I32

CHECKPOINT = -1
NOTHING: Mapping[int, I32] = MappingProxyType({})


def fetches(
    held: Mapping[int, I32],
    placement: I32,
    slots: Sequence[int],
    ranks_of_stage: Sequence[Sequence[int]],
    layer_stage: Sequence[int],
    stage_of: Mapping[int, int],
    spare: Mapping[int, I32] = NOTHING,
) -> I32:
    """What is to be fetched, int32 (n, 4), as Configure says it, by layer, then by slot.

    ``held``: by global rank, int32 (moe_layers, slots), what is in its slots, parked ranks too. ``placement``: int32
    (moe_layers, sum(slots)). ``ranks_of_stage[s]``: the global ranks of stage s by ep rank. ``layer_stage``: the stage
    of each layer; ``stage_of``: that of each rank in ``held``. ``spare``: int32 (moe_layers, any number), what ranks
    hold outside of their slots; those are numbered on behind them. Copies that stay where they are are taken before
    others, a rank's own before those of others, and of those the ones of who gives least. Each rank gets an expert once
    per layer: a second slot copies the first, which stands before it.
    """
    starts = np.concatenate([[0], np.cumsum(np.asarray(slots, dtype=np.int64))]).astype(int).tolist()
    rows: list[tuple[int, int, int, int]] = []
    given: dict[int, int] = {}
    for layer, stage in enumerate(layer_stage):
        receivers = ranks_of_stage[stage]
        wanted = [(rank, starts[e], placement[layer, starts[e] : starts[e + 1]]) for e, rank in enumerate(receivers)]
        needs = [(rank, first, want, _lacking(held.get(rank), layer, want)) for rank, first, want in wanted]
        experts = {int(want[slot]) for _, _, want, lacking in needs for slot in lacking}
        if not experts:
            continue
        stays = {rank: want for rank, _, want in wanted}
        sharers = [rank for rank in sorted(held) if stage_of[rank] == stage]
        copies = _copies(held, spare, stays, sharers, layer, experts)
        for rank, first, want, lacking in needs:
            has: dict[int, int] = {}
            for slot in lacking:
                expert = int(want[slot])
                source = (rank, has[expert]) if expert in has else _nearest(copies.get(expert, ()), rank, given)
                has.setdefault(expert, slot)
                if source[0] not in (rank, CHECKPOINT):
                    given[source[0]] = given.get(source[0], 0) + 1
                rows.append((layer, first + slot, *source))
    return np.asarray(rows, dtype=np.int32).reshape(-1, 4)


def _lacking(has: I32 | None, layer: int, want: I32) -> list[int]:
    """The slots of a rank that do not hold what they are to hold."""
    there = np.full(len(want), -1, dtype=np.int32)
    if has is not None:
        kept = min(has.shape[1], len(want))
        there[:kept] = has[layer, :kept]
    lacking: list[int] = np.flatnonzero(there != want).tolist()
    return lacking


_Copy = tuple[bool, int, int]
"""Whether its slot gets something else, its rank, its slot there."""


def _copies(
    held: Mapping[int, I32],
    spare: Mapping[int, I32],
    stays: Mapping[int, I32],
    ranks: Sequence[int],
    layer: int,
    experts: set[int],
) -> dict[int, list[_Copy]]:
    """Where there are copies of ``experts``."""
    copies: dict[int, list[_Copy]] = {}
    for rank in ranks:
        want = stays.get(rank)
        for slot, expert in enumerate(held[rank][layer].tolist()):
            if expert in experts:
                overwritten = want is not None and slot < len(want) and int(want[slot]) != expert
                copies.setdefault(expert, []).append((overwritten, rank, slot))
        if rank in spare:
            for slot, expert in enumerate(spare[rank][layer].tolist(), held[rank].shape[1]):
                if expert in experts:
                    copies.setdefault(expert, []).append((False, rank, slot))
    return copies


def _nearest(copies: Sequence[_Copy], receiver: int, given: Mapping[int, int]) -> tuple[int, int]:
    """Rank and slot of the copy to take."""
    if not copies:
        return CHECKPOINT, 0

    def distance(copy: _Copy) -> tuple[bool, bool, int, int, int]:
        overwritten, rank, slot = copy
        return overwritten, rank != receiver, given.get(rank, 0), rank, slot

    _, rank, slot = min(copies, key=distance)
    return rank, slot
