"""Which copy of an expert computes a token: the nearest, and where several are as near, all of them in turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.protocol.placement import PlacementMaps
from drumline.workers.layers import RoutingView

CPU = torch.device("cpu")
# Ranks 0 and 1 are on one host, 2 and 3 on another. Slots by rank: 0 1 2 | 3 4 | 5 6 7 | 8 9.
PLACEMENT = [0, 1, 2, 2, 3, 3, 4, 0, 0, 5]
SLOTS, NODES, EXPERTS = (3, 2, 3, 2), (7, 7, 9, 9), 6


def view(ep_rank: int, nodes: tuple[int, ...] = NODES) -> RoutingView:
    maps = PlacementMaps.build(np.array([PLACEMENT], dtype=np.int32), EXPERTS, len(SLOTS), SLOTS)
    return RoutingView.of(maps, 0, ep_rank, CPU, nodes)


def chosen(routing: RoutingView, expert: int, rows: int = 1, step: int = 0) -> list[int]:
    return routing.choose(torch.full((rows, 1), expert), step).view(-1).tolist()


@pytest.mark.parametrize(
    ("ep_rank", "expert", "candidates"),
    [
        (0, 0, {0}),  # on the rank itself
        (2, 0, {7}),
        (1, 0, {0}),  # on its host
        (1, 2, {3}),
        (0, 3, {4}),
        (3, 3, {5}),
        (3, 2, {2, 3}),  # on others: all of them
        (0, 4, {6}),  # the only one
        (3, 1, {1}),
    ],
)
def test_the_nearest_copies_are_taken_and_no_others(ep_rank: int, expert: int, candidates: set[int]) -> None:
    routing = view(ep_rank)
    assert set(chosen(routing, expert, rows=20)) == candidates
    assert {slot for step in range(10) for slot in chosen(routing, expert, step=step)} == candidates


def test_without_hosts_all_ranks_are_as_near() -> None:
    assert set(chosen(view(1, ()), 0, rows=30)) == {0, 7, 8}


def test_copies_that_are_as_near_share_the_load_within_a_step_and_over_steps_of_one_token() -> None:
    routing = view(1, ())
    counts = np.bincount(chosen(routing, 0, rows=300), minlength=10)
    assert counts[[0, 7, 8]].tolist() == [100] * 3
    counts = np.bincount([slot for step in range(300) for slot in chosen(routing, 0, step=step)], minlength=10)
    assert counts[[0, 7, 8]].tolist() == [100] * 3


def test_ranks_begin_at_different_copies() -> None:
    placement = np.array([[0, 1, 0, 2, 3, 4, 5, 6]], dtype=np.int32)
    maps = PlacementMaps.build(placement, 7, 4)
    first = [chosen(RoutingView.of(maps, 0, ep_rank, CPU), 0) for ep_rank in (2, 3)]
    assert sorted(first) == [[0], [2]]


def test_the_choice_depends_on_the_row_the_step_and_the_rank_alone() -> None:
    experts = torch.randint(0, EXPERTS, (50, 3), generator=torch.Generator().manual_seed(1))
    one, other = view(3).choose(experts, 5), view(3).choose(experts, 5)
    assert torch.equal(one, other)
    # A token's copies do not depend on what other tokens chose.
    assert torch.equal(view(3).choose(experts[:20], 5), one[:20])
    assert one.dtype == torch.int64


def test_every_choice_is_a_copy_of_the_expert_asked_for() -> None:
    experts: Tensor = torch.randint(0, EXPERTS, (200, 4), generator=torch.Generator().manual_seed(2))
    for ep_rank in range(len(SLOTS)):
        for nodes in (NODES, ()):
            slots = view(ep_rank, nodes).choose(experts, 3)
            assert torch.equal(torch.tensor(PLACEMENT)[slots], experts)


def test_where_each_expert_has_one_copy_there_is_nothing_to_choose() -> None:
    maps = PlacementMaps.build(np.array([[3, 1, 0, 2]], dtype=np.int32), 4, 2)
    routing = RoutingView.of(maps, 0, 0, CPU)
    assert routing.replicas is None
    assert routing.choose(torch.tensor([[0, 1], [2, 3]]), 9).tolist() == [[2, 1], [3, 0]]
