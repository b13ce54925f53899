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
