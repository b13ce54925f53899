"""A placement made of what ranks hold, how many slots they have for it, and what they must fetch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline.engine.core.cover import cover
from drumline.engine.core.fetches import CHECKPOINT, fetches
from drumline.engine.core.slots import choose_slots
from drumline.protocol.messages import I32
from drumline.protocol.placement import initial_placement


def i32(rows: list[list[int]]) -> I32:
    return np.asarray(rows, dtype=np.int32)


@st.composite
def holdings(draw: st.DrawFn) -> tuple[list[I32], tuple[int, ...], int]:
    """What some ranks hold, the slots that they are to have, and the number of experts."""
    experts = draw(st.integers(1, 12))
    ranks = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    slots = [draw(st.integers(0, 8)) for _ in range(ranks)]
    slots[0] += max(experts - sum(slots), 0)
    held = []
    for _ in range(ranks):
        width = draw(st.integers(0, 8))
        row = st.lists(st.integers(-1, experts - 1), min_size=width, max_size=width)
        held.append(np.asarray([draw(row) for _ in range(layers)], dtype=np.int32).reshape(layers, width))
    return held, tuple(slots), experts


@given(holdings())
def test_every_expert_has_a_slot_in_every_layer_and_every_slot_an_expert(
    case: tuple[list[I32], tuple[int, ...], int],
) -> None:
    held, slots, experts = case
    placement = cover(held, slots, experts)
    assert placement.dtype == np.int32
    assert placement.shape == (held[0].shape[0], sum(slots))
    assert placement.min() >= 0
    for layer in placement:
        assert set(layer.tolist()) == set(range(experts))


@given(holdings())
def test_what_is_in_place_stays_unless_it_is_one_copy_too_many(case: tuple[list[I32], tuple[int, ...], int]) -> None:
    held, slots, experts = case
    placement = cover(held, slots, experts)
    starts = np.concatenate([[0], np.cumsum(slots)])
    for layer in range(len(placement)):
        now = [(rank, slot, int(e)) for rank, has in enumerate(held) for slot, e in enumerate(has[layer]) if e >= 0]
        now = [(rank, slot, e) for rank, slot, e in now if slot < slots[rank]]
        stays = [e for rank, slot, e in now if placement[layer, starts[rank] + slot] == e]
        assert set(stays) == {e for _, _, e in now}
        distinct = {(rank, e) for rank, _, e in now}
        missing = experts - len({e for _, e in distinct})
        empty = sum(slots) - len(distinct)
        # No more copies are given up than there are missing experts without a free slot.
        assert len(distinct) - len(stays) <= max(missing - empty, 0)


@given(holdings())
def test_no_rank_has_two_copies_of_an_expert_while_it_has_no_more_slots_than_there_are_experts(
    case: tuple[list[I32], tuple[int, ...], int],
) -> None:
    held, slots, experts = case
    placement = cover(held, slots, experts)
    starts = np.concatenate([[0], np.cumsum(slots)])
    for rank, count in enumerate(slots):
        for layer in placement[:, starts[rank] : starts[rank + 1]]:
            assert len(set(layer.tolist())) == min(count, experts)


@given(holdings())
def test_the_same_holdings_give_the_same_placement_and_stay_what_they_were(
    case: tuple[list[I32], tuple[int, ...], int],
) -> None:
    held, slots, experts = case
    before = [has.copy() for has in held]
    assert (cover(held, slots, experts) == cover(before, slots, experts)).all()
    assert all((has == had).all() for has, had in zip(held, before, strict=True))


def test_spare_slots_get_copies_of_the_experts_with_fewest() -> None:
    placement = cover([i32([[0, 1, -1]]), i32([[2, 3, -1]])], (3, 3), 4)
    counts = np.bincount(placement[0], minlength=4)
    assert counts.max() == 2
    assert placement[0, :2].tolist() == [0, 1]
    assert placement[0, 3:5].tolist() == [2, 3]


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="3 slots cannot hold 4 experts"):
        cover([i32([[0, 1]])], (3,), 4)


def test_a_large_model_loses_a_rank() -> None:
    layers, experts, ranks, per_rank = 58, 256, 32, 9
    placement = initial_placement(layers, experts, ranks)
    held = [placement[:, rank * 8 : rank * 8 + 8] for rank in range(ranks - 1)]
    covered = cover(held, (per_rank,) * (ranks - 1), experts)
    for rank, has in enumerate(held):
        assert (covered[:, rank * per_rank : rank * per_rank + 8] == has).all()
    assert (np.diff(np.sort(covered, axis=1), axis=1) <= 1).all()
    assert (covered.max(axis=1) == experts - 1).all()


# -------------------------------------------------------------------------------------------------------------- fetches


@st.composite
def refits(draw: st.DrawFn) -> tuple[dict[int, I32], tuple[int, ...], int, list[list[int]], tuple[int, ...]]:
    """Ranks of one or two stages, some of which are parked: what they hold, slots, experts, stages, layers' stages."""
    stages = draw(st.integers(1, 2))
    layer_stage = tuple(draw(st.integers(0, stages - 1)) for _ in range(3))
    places, parked = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    experts = draw(st.integers(1, 8))
    slots = [draw(st.integers(1, 8)) for _ in range(places)]
    slots[0] += max(experts - sum(slots), 0)
    held: dict[int, I32] = {}
    ranks_of_stage: list[list[int]] = [[] for _ in range(stages)]
    for rank in range((places + parked) * stages):
        stage, width = rank % stages, draw(st.integers(0, 6))
        row = st.lists(st.integers(-1, experts - 1), min_size=width, max_size=width)
        has = np.asarray([draw(row) for _ in range(3)], dtype=np.int32).reshape(3, width)
        for layer in range(3):
            if layer_stage[layer] != stage:
                has[layer] = -1
        held[rank] = has
        if rank // stages < places:
            ranks_of_stage[stage].append(rank)
    return held, tuple(slots), experts, ranks_of_stage, layer_stage


def joined(held: dict[int, I32], ranks_of_stage: list[list[int]], layer_stage: tuple[int, ...], place: int) -> I32:
    width = max(held[ranks[place]].shape[1] for ranks in ranks_of_stage)
    out = np.full((len(layer_stage), width), -1, dtype=np.int32)
    for layer, stage in enumerate(layer_stage):
        has = held[ranks_of_stage[stage][place]][layer]
        out[layer, : len(has)] = has
    return out


@settings(max_examples=150)
@given(refits())
def test_after_the_fetches_every_slot_holds_what_the_placement_says(
    case: tuple[dict[int, I32], tuple[int, ...], int, list[list[int]], tuple[int, ...]],
) -> None:
    held, slots, experts, ranks_of_stage, layer_stage = case
    places = [joined(held, ranks_of_stage, layer_stage, place) for place in range(len(slots))]
    placement = cover(places, slots, experts)
    stage_of = {rank: rank % len(ranks_of_stage) for rank in held}
    todo = fetches(held, placement, slots, ranks_of_stage, layer_stage, stage_of)
    assert todo.dtype == np.int32
    starts = np.concatenate([[0], np.cumsum(slots)])
    now = {rank: np.full((3, 20), -1) for rank in held}
    for rank, has in held.items():
        now[rank][:, : has.shape[1]] = has
    received: set[tuple[int, int, int]] = set()
    for layer, slot, source, source_slot in todo.tolist():
        place = int(np.searchsorted(starts, slot, side="right")) - 1
        receiver = ranks_of_stage[layer_stage[layer]][place]
        expert = int(placement[layer, slot])
        if source == CHECKPOINT:
            assert not any((has[layer] == expert).any() for has in held.values())
        else:
            assert stage_of[source] == layer_stage[layer]
            # In this order, one after the other: nothing is overwritten before it was given.
            assert now[source][layer, source_slot] == expert
        if source != receiver:
            assert (layer, receiver, expert) not in received
            received.add((layer, receiver, expert))
        now[receiver][layer, slot - starts[place]] = expert
    for layer, stage in enumerate(layer_stage):
        for place, rank in enumerate(ranks_of_stage[stage]):
            want = placement[layer, starts[place] : starts[place + 1]]
            assert (now[rank][layer, : len(want)] == want).all()


def test_a_rank_takes_what_it_has_itself_before_it_asks_others() -> None:
    held = {0: i32([[0, 1, 2, 3]]), 1: i32([[3]])}
    todo = fetches(held, i32([[0, 3, 2, 1]]), (2, 2), [[0, 1]], (0,), {0: 0, 1: 0})
    assert todo.tolist() == [[0, 1, 0, 3], [0, 2, 0, 2], [0, 3, 0, 1]]


def test_copies_are_given_by_all_who_have_them() -> None:
    held = {0: i32([[0, 1]]), 1: i32([[0, 1]]), 2: i32([[-1, -1]])}
    placement = i32([[0, 1, 0, 1, 0, 1]])
    todo = fetches(held, placement, (2, 2, 2), [[0, 1, 2]], (0,), {0: 0, 1: 0, 2: 0})
    assert todo.tolist() == [[0, 4, 0, 0], [0, 5, 1, 1]]


def test_nothing_is_fetched_for_what_is_in_place() -> None:
    assert fetches({0: i32([[1, 0]])}, i32([[1, 0]]), (2,), [[0]], (0,), {0: 0}).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------------- slots


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.integers(1, 30))
def test_slots_suffice_within_capacity_and_no_rank_loses_any(ranks: list[tuple[int, int]], experts: int) -> None:
    initial = [had for had, _ in ranks]
    capacity = [had + more for had, more in ranks]
    most = [max(had, min(room, experts)) for had, room in zip(initial, capacity, strict=True)]
    slots = choose_slots(experts, initial, capacity)
    if sum(initial) >= experts:
        assert slots == tuple(initial)
    elif sum(most) < experts:
        assert slots is None
    else:
        assert slots is not None
        assert sum(slots) == experts
        assert all(had <= got <= room for had, got, room in zip(initial, slots, most, strict=True))
        # Evenly: nobody was given a slot while another with fewer had room.
        grown = [got for had, got in zip(initial, slots, strict=True) if got > had]
        roomy = [got for got, room in zip(slots, most, strict=True) if got < room]
        assert not grown or not roomy or max(grown) <= min(roomy) + 1


def test_the_lost_share_is_spread() -> None:
    assert choose_slots(8, (2, 2, 2), (8, 8, 8)) == (3, 3, 2)
    assert choose_slots(8, (2, 2, 2), (2, 8, 8)) == (2, 3, 3)
    assert choose_slots(8, (2, 2), (3, 4)) is None
    assert choose_slots(8, (4, 5), (4, 5)) == (4, 5)
