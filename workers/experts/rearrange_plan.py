"""What a change of all expert slots means for a group of ranks: who holds what, and what goes where in which round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32, I32Matrix
from drumline.protocol.rounds import pair_rounds

EMPTY = -1
GONE = -1


@dataclass(frozen=True, slots=True)
class SlotChange:
    """``held`` and ``wanted``: int32 (layers, slots), the logical expert of each slot of the group, before and after;
    -1: nothing. Position r of the group has slots ``offsets[r]`` to ``offsets[r + 1]``."""

    held: I32Matrix
    wanted: I32Matrix
    offsets: I32

    def slots_of(self, position: int) -> slice:
        """Those of the group's slots that ``position`` has."""
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))


def read_change(
    old: I32Matrix,
    new: I32Matrix,
    size: int,
    rank_mapping: Mapping[int, int] | None = None,
    slots: Sequence[int] | None = None,
    old_slots: Sequence[int] | None = None,
) -> SlotChange:
    """Both placements as the ``size`` ranks of the group see them; arguments as in
    :func:`~drumline.workers.experts.rearrange_expert_weights_inplace`. Raises InvalidConfig."""
    for name, placement in (("old_global_expert_indices", old), ("new_global_expert_indices", new)):
        if placement.ndim != 2 or not np.issubdtype(placement.dtype, np.integer):
            raise InvalidConfig(name, f"{placement.dtype} {placement.shape}", "integers (MoE layers, physical experts)")
        if placement.min(initial=0) < EMPTY:
            raise InvalidConfig(name, f"expert {placement.min()}", "experts from 0, -1 for a slot that holds none")
    if len(old) != len(new):
        raise InvalidConfig("new_global_expert_indices", f"{len(new)} MoE layers", f"{len(old)}, as in the old ones")
    mapping = {rank: rank for rank in range(size)} if rank_mapping is None else _check_mapping(rank_mapping)
    if len(mapping) == size:
        # The old ranks are all there. Those that leave give what they have and get nothing.
        share = _shares("old_global_expert_indices", old.shape[1], size, slots)
        stay = {rank: to for rank, to in mapping.items() if to != GONE}
        widths = [share[rank] for rank in sorted(stay, key=lambda rank: stay[rank])]
        _check_targets(stay, len(stay))
        _check_width("new_global_expert_indices", new.shape[1], widths)
        wanted = _spread(new, widths, {to: rank for rank, to in stay.items()}, share)
        return SlotChange(old.astype(np.int32), wanted, _offsets(share))
    # The new ranks are there. What only those had that are gone is lost.
    share = _shares("new_global_expert_indices", new.shape[1], size, slots)
    _check_targets({rank: to for rank, to in mapping.items() if to != GONE}, size)
    before = _shares("old_global_expert_indices", old.shape[1], len(mapping), old_slots)
    held = _spread(old, before, {rank: to for rank, to in mapping.items() if to != GONE}, share)
    return SlotChange(held, new.astype(np.int32), _offsets(share))


def _check_mapping(mapping: Mapping[int, int]) -> dict[int, int]:
    if sorted(mapping) != list(range(len(mapping))):
        raise InvalidConfig("rank_mapping", f"old ranks {sorted(mapping)}", "each old rank from 0 on, once")
    return {rank: mapping[rank] for rank in sorted(mapping)}


def _check_targets(stay: Mapping[int, int], ranks: int) -> None:
    targets = list(stay.values())
    if len(set(targets)) != len(targets) or any(not 0 <= to < ranks for to in targets):
        raise InvalidConfig("rank_mapping", f"new ranks {targets}", f"different ranks of 0 to {ranks - 1}, or -1: gone")


def _shares(field: str, width: int, size: int, slots: Sequence[int] | None) -> list[int]:
    """How many slots each of ``size`` ranks has."""
    if slots is None:
        return [int(share) for share in slots_per_rank(width, size)]
    if len(slots) != size or min(slots) < 0 or sum(slots) != width:
        raise InvalidConfig("slots", list(slots), f"{size} numbers from 0 that add up to the {width} of {field}")
    return list(slots)


def _check_width(field: str, width: int, shares: Sequence[int]) -> None:
    if width != sum(shares):
        raise InvalidConfig(field, f"{width} physical experts", f"{sum(shares)}: {list(shares)} on the ranks that stay")


def _spread(
    placement: I32Matrix, shares: Sequence[int], position_of: Mapping[int, int], room: Sequence[int]
) -> I32Matrix:
    """The columns of rank r, ``shares[r]`` of them, at its position, where there is ``room`` for as many."""
    spread = np.full((len(placement), sum(room)), EMPTY, dtype=np.int32)
    source, target = _offsets(shares), _offsets(room)
    for rank, position in position_of.items():
        if shares[rank] > room[position]:
            raise InvalidConfig("slots", f"{room[position]} for position {position}", f"the {shares[rank]} that it had")
        first = int(target[position])
        spread[:, first : first + shares[rank]] = placement[:, int(source[rank]) : int(source[rank + 1])]
    return spread


def _offsets(shares: Sequence[int]) -> I32:
    return np.concatenate([[0], np.cumsum(np.asarray(shares, dtype=np.int64))]).astype(np.int32)


def check_sources(change: SlotChange) -> None:
    """Raises InvalidConfig, naming layers and experts, when an expert that is wanted is held nowhere."""
    lost = [
        f"{np.setdiff1d(wanted[wanted != EMPTY], held).tolist()} of MoE layer {layer}"
        for layer, (held, wanted) in enumerate(zip(change.held, change.wanted, strict=True))
        if len(np.setdiff1d(wanted[wanted != EMPTY], held))
    ]
    if lost:
        found = "no copy of experts " + ", ".join(lost)
        raise InvalidConfig("old_global_expert_indices", found, "one of each on a rank of the group")


def plan_layer(change: SlotChange, layer: int, near: Sequence[Sequence[bool]] | None = None) -> tuple[I32Matrix, I32]:
    """The moves of one layer: int32 (n, 4) as ``fetches`` in StageExperts, ranks being positions, and their rounds.

    Every position gets an expert that it has not at most once, and a second slot copies the first; what it has comes
    from a slot of its own. Of other holders the one that is ``near`` (``near[r][s]``: positions r and s share a node),
    then the one that gives least. Every expert that is wanted must be held (see :func:`check_sources`).
    """
    held, wanted = change.held[layer], change.wanted[layer]
    holders: dict[int, list[tuple[int, int]]] = {}
    for position in range(len(change.offsets) - 1):
        for slot, expert in enumerate(held[change.slots_of(position)].tolist()):
            holders.setdefault(expert, []).append((position, slot))
    given = [0] * (len(change.offsets) - 1)
    rows: list[tuple[int, int, int, int]] = []
    receivers: list[int] = []
    for position in range(len(change.offsets) - 1):
        span = change.slots_of(position)
        lacking = np.flatnonzero((wanted[span] != held[span]) & (wanted[span] != EMPTY)).tolist()
        fetched: dict[int, int] = {}
        for slot in lacking:
            expert = int(wanted[span.start + slot])
            source = (
                (position, fetched[expert])
                if expert in fetched
                else _nearest(holders[expert], position, given, None if near is None else near[position])
            )
            if source[0] != position:
                fetched[expert] = slot
                given[source[0]] += 1
            rows.append((layer, span.start + slot, *source))
            receivers.append(position)
    to = np.asarray(receivers, dtype=np.int32)
    return pair_rounds(np.asarray(rows, dtype=np.int32).reshape(-1, 4), to, change.offsets[to])


def _nearest(
    copies: Sequence[tuple[int, int]], position: int, given: Sequence[int], near: Sequence[bool] | None
) -> tuple[int, int]:
    """Position and slot of the copy to take."""

    def distance(copy: tuple[int, int]) -> tuple[bool, bool, int, int, int]:
        source, slot = copy
        return source != position, near is not None and not near[source], given[source], source, slot

    return min(copies, key=distance)
