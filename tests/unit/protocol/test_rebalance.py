"""The published balancing algorithm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drumline.engine import rebalance_experts
from drumline.protocol.errors import InvalidConfig

LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_comes_out_exactly() -> None:
    physical, logical, count = rebalance_experts(LOAD, 16, 4, 2, 8)
    assert physical.tolist() == PUBLISHED
    assert logical.shape == (2, 12, 5)
    assert count.sum(axis=1).tolist() == [16, 16]
    assert {array.dtype for array in (physical, logical, count)} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("groups", "nodes"), [(4, 2), (3, 2), (1, 1), (8, 4)])
def test_the_three_maps_say_the_same(groups: int, nodes: int) -> None:
    load = np.random.default_rng(groups).lognormal(size=(5, 24))
    physical, logical, count = rebalance_experts(load, 32, groups, nodes, 8)
    for layer in range(5):
        for expert in range(24):
            slots = logical[layer, expert][: count[layer, expert]]
            assert (logical[layer, expert][count[layer, expert] :] == -1).all()
            assert sorted(slots) == np.flatnonzero(physical[layer] == expert).tolist()


def test_a_group_stays_on_one_node_where_groups_divide_by_nodes() -> None:
    load = np.random.default_rng(1).lognormal(size=(6, 24))
    physical, _, _ = rebalance_experts(load, 32, 8, 4, 16)
    groups = physical.reshape(6, 4, 8) // 3
    for layer in range(6):
        seen = [set(groups[layer, node].tolist()) for node in range(4)]
        assert [len(one) for one in seen] == [2] * 4
        assert len(set.union(*seen)) == 8


def test_groups_that_do_not_divide_by_nodes_do_not_matter() -> None:
    load = np.random.default_rng(2).lognormal(size=(2, 24))
    for one, other in zip(rebalance_experts(load, 32, 3, 2, 8), rebalance_experts(load, 32, 1, 1, 8), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((18, 4, 2, 8), "num_replicas: found 18; valid: a multiple of the 8 GPUs"),
        ((8, 4, 2, 8), "num_replicas: found 8; valid: 12 or more, one slot for each expert"),
        ((16, 8, 2, 8), "num_groups: found 8; valid: a divisor of the 12 experts"),
        ((16, 4, 2, 7), "num_gpus: found 7; valid: a multiple of the 2 nodes"),
        ((16, 4, 0, 8), "num_nodes: found 0; valid: a whole number from 1"),
        ((16, 0, 2, 8), "num_groups: found 0; valid: a whole number from 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(sizes: tuple[int, int, int, int], text: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        rebalance_experts(LOAD, *sizes)
    assert isinstance(caught.value, ValueError)
    assert caught.value.text == text


@pytest.mark.parametrize(
    "weight",
    [
        [1.0, 2.0],
        [[]],
        np.ones((0, 2)),
        [[1.0, float("nan")]],
        [[1.0, -1.0]],
        [[3e38, 3e38]],
        [[1e39, 0.0]],
        [["a", "b"]],
        [[1j, 2.0]],
        [[1.0], [1.0, 2.0]],
        None,
    ],
)
def test_what_is_no_load_is_refused(weight: Any) -> None:
    with pytest.raises(InvalidConfig, match="weight"):
        rebalance_experts(weight, 4, 1, 1, 2)


@pytest.mark.parametrize("size", [16.0, "16", True, None])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"num_replicas: found .*; valid: a whole number from 1"):
        rebalance_experts(LOAD, size, 4, 2, 8)


def _pack(loads: list[np.float32], packs: int) -> list[tuple[int, int]]:
    size = len(loads) // packs
    if size == 1:
        return [(item, 0) for item in range(len(loads))]
    total, filled = [np.float32(0)] * packs, [0] * packs
    where = [(0, 0)] * len(loads)
    for item in sorted(range(len(loads)), key=lambda one: -loads[one]):
        pack = min((one for one in range(packs) if filled[one] < size), key=lambda one: total[one])
        where[item] = pack, filled[pack]
        filled[pack] += 1
        total[pack] += loads[item]
    return where


def _copied(loads: list[np.float32], slots: int) -> tuple[list[int], list[int]]:
    items, count = list(range(len(loads))), [1] * len(loads)
    while len(items) < slots:
        busiest = max(range(len(loads)), key=lambda one: loads[one] / np.float32(count[one]))
        items.append(busiest)
        count[busiest] += 1
    return items, count


def _in_loops(load: Any, slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The published description for one layer, an item at a time."""
    if groups % nodes:
        groups = nodes = 1
    size, of_gpu, of_node = len(load) // groups, slots // gpus, slots // nodes
    where = _pack([load[one * size : (one + 1) * size].sum() for one in range(groups)], nodes)
    placement = [-1] * slots
    for node in range(nodes):
        own = sorted((place, group) for group, (its, place) in enumerate(where) if its == node)
        experts = [group * size + one for _, group in own for one in range(size)]
        items, count = _copied([load[one] for one in experts], of_node)
        shares = [load[experts[one]] / np.float32(count[one]) for one in items]
        for item, (gpu, place) in zip(items, _pack(shares, gpus // nodes), strict=True):
            placement[node * of_node + gpu * of_gpu + place] = experts[item]
    return placement


@pytest.mark.parametrize("seed", range(40))
def test_one_item_after_the_other_comes_to_the_same_also_with_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    nodes, groups, size = (int(one) for one in random.integers(1, (5, 9, 8)))
    gpus = nodes * int(random.integers(1, 5))
    slots = gpus * (-(-groups * size // gpus) + int(random.integers(0, 4)))
    load = random.integers(0, 4 if seed % 2 else 1000, (2, groups * size)).astype(np.float32)
    physical = rebalance_experts(load, slots, groups, nodes, gpus)[0]
    assert physical.tolist() == [_in_loops(row, slots, groups, nodes, gpus) for row in load]
