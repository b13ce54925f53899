from __future__ import annotations

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Coordinates, Layout, slots_per_rank


def test_ranks_run_through_tp_then_pp_then_dp() -> None:
    layout = Layout(data_parallel_size=2, pipeline_parallel_size=3, tensor_parallel_size=2)
    assert layout.num_ranks == 12
    assert layout.world_size == 6
    assert layout.global_rank(1, 2, 1) == 11
    assert [layout.coordinates(r) for r in (0, 1, 2, 6, 11)] == [
        Coordinates(0, 0, 0),
        Coordinates(0, 0, 1, 0, 1),
        Coordinates(0, 1, 0),
        Coordinates(1, 0, 0),
        Coordinates(1, 2, 1, 0, 1),
    ]


def test_coordinates_and_global_rank_undo_each_other() -> None:
    layout = Layout(data_parallel_size=3, pipeline_parallel_size=2, tensor_parallel_size=4)
    for rank in range(layout.num_ranks):
        at = layout.coordinates(rank)
        assert layout.global_rank(at.dp_rank, at.pp_rank, at.tp_rank) == rank


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(InvalidConfig, match="0 to 3"):
        Layout(data_parallel_size=4).coordinates(rank)


def test_groups_of_a_rank() -> None:
    layout = Layout(2, 2, 2, enable_expert_parallel=True)
    assert layout.tp_group(6) == (6, 7)
    assert layout.pp_group(5) == (5, 7)
    assert layout.dp_group(1) == (1, 5)
    assert layout.expert_group(3) == (2, 3, 6, 7)
    assert layout.replica_ranks(1) == (4, 5, 6, 7)


def test_experts_are_spread_over_the_ranks_of_their_own_stage_only() -> None:
    layout = Layout(pipeline_parallel_size=4, tensor_parallel_size=2, enable_expert_parallel=True)
    assert layout.ep_size == 2
    assert [layout.ep_rank(r) for r in range(8)] == [0, 1] * 4
    assert layout.expert_group(5) == (4, 5)


def test_ep_rank_is_the_place_in_the_expert_group() -> None:
    layout = Layout(3, 2, 2, enable_expert_parallel=True)
    for rank in range(layout.num_ranks):
        assert layout.expert_group(rank)[layout.ep_rank(rank)] == rank


def test_without_expert_parallel_every_rank_is_alone() -> None:
    layout = Layout(data_parallel_size=4)
    assert layout.ep_size == 1
    assert [layout.ep_rank(r) for r in range(4)] == [0, 0, 0, 0]


def test_moe_replicas_step_together_and_dense_ones_alone() -> None:
    layout = Layout(data_parallel_size=3)
    assert layout.lockstep_groups(is_moe=True) == ((0, 1, 2),)
    assert layout.lockstep_groups(is_moe=False) == ((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        (Layout(0), "data_parallel_size"),
        (Layout(-2), "data_parallel_size"),
        (Layout(True), "data_parallel_size"),
        (Layout(tensor_parallel_size=0), "tensor_parallel_size"),
        (Layout(pipeline_parallel_size=-1), "pipeline_parallel_size"),
        (Layout(tensor_parallel_size=4, attention_data_parallel_size=3), "attention_data_parallel_size"),
        (Layout(pipeline_parallel_size=2, pipeline_partition=(1, 2, 3)), "pipeline_partition"),
        (Layout(pipeline_parallel_size=2, pipeline_partition=(0, 2)), "pipeline_partition"),
    ],
)
def test_sizes_that_make_no_world_are_refused_by_field(layout: Layout, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        layout.check()
    assert caught.value.field == field
    assert caught.value.info.valid


def test_the_groups_of_two_by_two_by_two() -> None:
    layout = Layout(2, 2, 2)
    ranks = range(8)
    assert sorted({layout.pp_group(r) for r in ranks}) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert sorted({layout.dp_group(r) for r in ranks}) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert sorted({layout.expert_group(r) for r in ranks}) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert sorted({layout.tp_group(r) for r in ranks}) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_attention_replicas_are_neighbours_within_the_tp_ranks_of_each_stage() -> None:
    layout = Layout(1, 2, 4, attention_data_parallel_size=2)
    assert layout.attn_tp_group(1) == (0, 1)
    assert layout.attn_tp_group(6) == (6, 7)
    assert layout.attn_dp_group(1) == (1, 3)
    assert layout.ranks_of_replica(1) == (2, 3, 6, 7)
    assert [layout.reporting_rank(replica) for replica in range(2)] == [4, 6]
    assert [layout.replica_of(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert layout.coordinates(7).attn_rank == layout.coordinates(7).attn_tp_rank == 1


@pytest.mark.parametrize(
    ("slots", "ranks", "expected"),
    [(16, 4, (4, 4, 4, 4)), (7, 3, (3, 2, 2)), (8, 3, (3, 3, 2)), (2, 3, (1, 1, 0)), (0, 2, (0, 0)), (5, 1, (5,))],
)
def test_the_first_ranks_take_the_slots_that_are_left(slots: int, ranks: int, expected: tuple[int, ...]) -> None:
    assert slots_per_rank(slots, ranks) == expected


@pytest.mark.parametrize(("slots", "ranks"), [(4, 0), (-1, 2)])
def test_slots_without_ranks_are_refused(slots: int, ranks: int) -> None:
    with pytest.raises(InvalidConfig):
        slots_per_rank(slots, ranks)
