from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.placement import PlacementMaps, initial_placement


def test_linear_placement_is_contiguous() -> None:
    placement = initial_placement(2, 5, 2)
    np.testing.assert_array_equal(placement, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    assert placement.dtype == np.int32
    assert placement.flags.c_contiguous


def test_round_robin_deals_the_experts_out() -> None:
    np.testing.assert_array_equal(initial_placement(1, 7, 3, "round_robin"), [[0, 3, 6, 1, 4, 2, 5]])


def test_both_strategies_give_a_rank_as_many_experts_as_it_has_slots() -> None:
    for strategy in ("linear", "round_robin"):
        maps = PlacementMaps.build(initial_placement(1, 10, 4, strategy), 10, 4)
        assert [len(maps.local_slots(r)) for r in range(4)] == [3, 3, 2, 2]


def test_redundant_copies_follow_all_experts_in_the_same_order() -> None:
    np.testing.assert_array_equal(initial_placement(2, 5, 3, num_redundant=2), [[0, 1, 2, 3, 4, 0, 1]] * 2)
    np.testing.assert_array_equal(initial_placement(1, 4, 4, num_redundant=6), [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(initial_placement(1, 5, 2, "round_robin", 2), [[0, 2, 4, 1, 3, 0, 2]])


@given(st.integers(1, 16), st.integers(1, 8), st.integers(0, 120), st.sampled_from(["linear", "round_robin"]))
def test_no_rank_starts_with_two_copies_of_an_expert(experts: int, ranks: int, redundant: int, strategy: str) -> None:
    ranks = min(ranks, experts)
    redundant = min(redundant, experts * (ranks - 1))
    maps = PlacementMaps.build(initial_placement(1, experts, ranks, strategy, redundant), experts, ranks)
    assert maps.num_slots == experts + redundant
    assert maps.logical_replica_count.max() - maps.logical_replica_count.min() <= 1
    for rank in range(ranks):
        own = maps.local_slots(rank)
        held = maps.physical_to_logical[0, own.start : own.stop].tolist()
        assert len(set(held)) == len(held)


def test_a_model_without_moe_layers_has_an_empty_placement() -> None:
    assert initial_placement(0, 8, 2).shape == (0, 8)
    maps = PlacementMaps.build(np.zeros((0, 0), dtype=np.int32), 0, 1)
    assert maps.num_slots == 0
    assert maps.local_slots(0) == range(0)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ((1, 4, 2, "random"), "expert_placement_strategy"),
        ((1, 4, 5), "ep_size"),
        ((1, 4, 0), "ep_size"),
        ((-1, 4, 2), "num_moe_layers"),
        ((1, 4, 2, "linear", 5), "num_redundant_experts"),
        ((1, 4, 2, "linear", -1), "num_redundant_experts"),
        ((1, 4, 1, "linear", 1), "num_redundant_experts"),
    ],
)
def test_impossible_placements_are_refused(args: tuple[Any, ...], field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        initial_placement(*args)
    assert caught.value.field == field


def test_maps_of_a_placement_with_copies() -> None:
    maps = PlacementMaps.build(np.array([[0, 1, 2, 1, 0], [2, 2, 1, 0, 2]], dtype=np.int32), 3, 2)
    np.testing.assert_array_equal(
        maps.logical_to_physical,
        [[[0, 4, -1], [1, 3, -1], [2, -1, -1]], [[3, -1, -1], [2, -1, -1], [0, 1, 4]]],
    )
    np.testing.assert_array_equal(maps.logical_replica_count, [[2, 2, 1], [1, 1, 3]])
    np.testing.assert_array_equal(maps.slot_rank, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(maps.rank_offsets, [0, 3, 5])
    assert maps.local_slots(1) == range(3, 5)
    for array in (maps.physical_to_logical, maps.logical_to_physical, maps.slot_rank):
        assert array.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_the_placement_given_is_not_locked() -> None:
    given_array = np.array([[0, 1]], dtype=np.int32)
    PlacementMaps.build(given_array, 2, 1)
    given_array[0, 0] = 1


@pytest.mark.parametrize(
    ("placement", "found"),
    [
        ([[0, 1, 3]], "expert 3 in slot 2 of MoE layer 0"),
        ([[0, 1, 2], [0, -1, 2]], "expert -1 in slot 1 of MoE layer 1"),
        ([[0, 1, 2], [0, 0, 2]], "no slot for expert 1 of MoE layer 1"),
    ],
)
def test_a_placement_that_misses_an_expert_is_refused(placement: list[list[int]], found: str) -> None:
    with pytest.raises(InvalidConfig, match=found):
        PlacementMaps.build(np.array(placement, dtype=np.int32), 3, 2)


def test_a_placement_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="moe layers, slots"):
        PlacementMaps.build(np.arange(3, dtype=np.int32), 3, 1)
    with pytest.raises(InvalidConfig, match="float64"):
        PlacementMaps.build(np.zeros((1, 3)), 3, 1)  # type: ignore[arg-type]


@given(st.data())
def test_maps_invert_any_placement(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    copies = data.draw(st.lists(st.integers(0, experts - 1), max_size=8))
    layers = data.draw(st.integers(1, 3))
    ep_size = data.draw(st.integers(1, 4))
    rows = [data.draw(st.permutations([*range(experts), *copies])) for _ in range(layers)]
    placement = np.array(rows, dtype=np.int32)
    maps = PlacementMaps.build(placement, experts, ep_size)
    for layer in range(layers):
        for expert in range(experts):
            slots = [s for s in range(placement.shape[1]) if placement[layer, s] == expert]
            listed = [s for s in maps.logical_to_physical[layer, expert].tolist() if s >= 0]
            assert listed == slots
            assert maps.logical_replica_count[layer, expert] == len(slots)
    owned = [len(maps.local_slots(r)) for r in range(ep_size)]
    assert tuple(owned) == slots_per_rank(placement.shape[1], ep_size)
    assert maps.slot_rank.tolist() == [r for r, n in enumerate(owned) for _ in range(n)]


def test_ranks_may_have_slots_of_their_own_number() -> None:
    placement = np.array([[0, 1, 2, 2, 0]], dtype=np.int32)
    maps = PlacementMaps.build(placement, 3, 3, (1, 4, 0))
    assert maps.slot_rank.tolist() == [0, 1, 1, 1, 1]
    assert [list(maps.local_slots(rank)) for rank in range(3)] == [[0], [1, 2, 3, 4], []]
    assert maps.logical_to_physical.tolist() == [[[0, 4], [1, -1], [2, 3]]]


@pytest.mark.parametrize("slots", [(1, 4), (1, 4, 1), (6, 0, -1), (5,)])
def test_slots_that_do_not_add_up_are_refused(slots: tuple[int, ...]) -> None:
    placement = np.array([[0, 1, 2, 2, 0]], dtype=np.int32)
    with pytest.raises(InvalidConfig, match="3 numbers from 0 that add up to 5"):
        PlacementMaps.build(placement, 3, 3, slots)
