"""How many expert slots each rank of an epoch has; no I/O."""

from __future__ import annotations

from collections.abc import Sequence


def choose_slots(num_experts: int, initial: Sequence[int], capacity: Sequence[int]) -> tuple[int, ...] | None:
    """Slots of each ep rank, enough for all ``num_experts`` together: ``initial`` if that suffices, else grown evenly,
    those with fewest first, up to ``capacity``. None when even that is not enough.

    A rank has no more slots than there are experts, unless it starts with more.
    """
    if sum(initial) >= num_experts:
        return tuple(initial)
    most = [max(had, min(room, num_experts)) for had, room in zip(initial, capacity, strict=True)]
    if sum(most) < num_experts:
        return None
    # The highest level to which all can be filled, then one more for as many as are still lacking.
    low, high = 0, num_experts
    while low < high:
        level = (low + high + 1) // 2
        if sum(_filled(had, room, level) for had, room in zip(initial, most, strict=True)) <= num_experts:
            low = level
        else:
            high = level - 1
    slots = [_filled(had, room, low) for had, room in zip(initial, most, strict=True)]
    lacking = num_experts - sum(slots)
    for place, room in enumerate(most):
        if lacking and slots[place] == low and slots[place] < room:
            slots[place] += 1
            lacking -= 1
    return tuple(slots)


def _filled(had: int, room: int, level: int) -> int:
    return max(had, min(room, level))
