"""What the report says that each rank holds."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from drumline.engine.layout_report.ranks import rank_reports
from drumline.engine.layout_report.report import report
from drumline.protocol.layout import Layout
from drumline.protocol.placement import initial_placement
from tests.unit.specs import DENSE

from .worlds import LATENT, MOE, WORLD, question, report_on


def test_groups_of_two_by_two_by_two() -> None:
    groups = report_on(MOE, enable_expert_parallel=True, **WORLD).groups
    assert groups["tp"] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups["pp"] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups["dp"] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert groups["ep"] == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_every_rank_names_the_groups_that_it_is_in() -> None:
    for one in report_on(MOE, **WORLD).ranks:
        assert all(one.rank in group for group in one.groups.values())
    assert "ep" not in report_on(DENSE, **WORLD).groups


def test_a_third_of_a_hundred_experts_over_four_ranks_linear() -> None:
    ranks = report_on(MOE, tensor_parallel_size=4, enable_expert_parallel=True).ranks
    assert [one.experts[1] for one in ranks] == [
        tuple(range(9)),
        tuple(range(9, 17)),
        tuple(range(17, 25)),
        tuple(range(25, 33)),
    ]


def test_a_third_of_a_hundred_experts_over_four_ranks_round_robin() -> None:
    strategy = "round_robin"
    ranks = report_on(MOE, data_parallel_size=4, enable_expert_parallel=True, expert_placement_strategy=strategy).ranks
    assert [one.experts[29] for one in ranks] == [tuple(range(rank, 33, 4)) for rank in range(4)]
    assert [one.num_experts for one in ranks] == [9, 8, 8, 8]


def test_experts_belong_to_the_ranks_of_their_own_stage() -> None:
    ranks = report_on(MOE, pipeline_parallel_size=2, enable_expert_parallel=True).ranks
    assert [one.layers for one in ranks] == [(0, 15), (15, 30)]
    assert [tuple(one.experts) for one in ranks] == [tuple(range(1, 15)), tuple(range(15, 30))]
    assert [one.moe_layers for one in ranks] == [14, 15]


def test_without_expert_parallel_each_rank_holds_a_slice_of_every_expert() -> None:
    ranks = report_on(MOE, data_parallel_size=2, tensor_parallel_size=2).ranks
    assert [one.expert_mlp for one in ranks] == [(0, 6), (6, 12), (12, 18), (18, 24)]
    assert all(one.experts[1] == tuple(range(33)) and one.ep_rank == 0 for one in ranks)


def test_thirty_layers_over_four_stages() -> None:
    made = report_on(DENSE, pipeline_parallel_size=4)
    assert made.config.pipeline_partition == (7, 8, 8, 7)
    assert [one.layers for one in made.ranks] == [(0, 7), (7, 15), (15, 23), (23, 30)]
    assert [(one.embedding, one.head) for one in made.ranks] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert made.ranks[1].vocab == (0, 0)


def test_a_rank_without_a_kind_of_layer_has_nothing_of_it() -> None:
    first, second = report_on(LATENT, pipeline_parallel_size=2).ranks
    assert (first.mlp, second.mlp) == ((0, 96), (0, 0))
    dense = report_on(DENSE).ranks[0]
    assert (dense.shared_mlp, dense.expert_mlp, dense.experts) == ((0, 0), (0, 0), {})


def test_deepseek_v3_over_two_and_four() -> None:
    made = report_on("deepseek-v3", tensor_parallel_size=2, pipeline_parallel_size=4, enable_expert_parallel=True)
    assert made.model.moe_layers == tuple(range(3, 61))
    for one in made.ranks:
        assert all(len(ids) == 128 for ids in one.experts.values())
        assert tuple(one.experts) == tuple(range(max(3, one.layers[0]), one.layers[1]))
    for stage in range(4):
        left, right = (one for one in made.ranks if one.pp_rank == stage)
        assert left.experts != right.experts
        for layer, ids in left.experts.items():
            assert sorted(ids + right.experts[layer]) == list(range(256))
    assert made.ranks[0].kv_bytes_per_token == 15 * (512 + 64) * 2


def test_kv_bytes_of_heads_that_are_held_twice() -> None:
    shared = report_on(DENSE, tensor_parallel_size=2).ranks
    assert [(one.kv_heads, one.kv_replicated) for one in shared] == [((0, 1), False), ((1, 2), False)]
    double = report_on(DENSE, tensor_parallel_size=4).ranks
    assert [one.kv_heads for one in double] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert all(one.kv_replicated for one in double)
    # 30 layers, keys and values, one head of 16 channels, two bytes each.
    assert {one.kv_bytes_per_token for one in (*shared, *double)} == {30 * 2 * 16 * 2}


def test_a_latent_is_whole_on_every_rank() -> None:
    ranks = report_on(LATENT, tensor_parallel_size=4).ranks
    assert {one.kv_bytes_per_token for one in ranks} == {30 * (40 + 8) * 2}
    assert all(one.kv_replicated for one in ranks)


def test_attention_replicas_hold_heads_and_rows_of_their_own() -> None:
    made = report_on(DENSE, tensor_parallel_size=4, enable_dp_attention=True)
    assert [one.q_heads for one in made.ranks] == [(0, 4), (4, 8), (0, 4), (4, 8)]
    assert [(one.replica, one.attn_rank, one.attn_tp_rank) for one in made.ranks] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 1, 0),
        (1, 1, 1),
    ]
    assert not any(one.kv_replicated for one in made.ranks)
    assert [one.mlp for one in made.ranks] == [(0, 24), (24, 48), (48, 72), (72, 96)]
    assert made.groups["attn_tp"] == ((0, 1), (2, 3))
    assert made.groups["attn_dp"] == ((0, 2), (1, 3))
    assert [one.ranks for one in made.replicas] == [(0, 1), (2, 3)]


def test_sharded_weights_add_up_to_the_model() -> None:
    whole = report_on(MOE).ranks[0].weight_bytes
    ranks = report_on(MOE, tensor_parallel_size=2, pipeline_parallel_size=3, enable_expert_parallel=True).ranks
    for kind in ("experts", "mlp", "embedding", "head"):
        assert sum(one.weight_bytes.get(kind, 0) for one in ranks) == whole[kind], kind


def test_the_dtype_asked_for_counts() -> None:
    spec = msgspec.structs.replace(DENSE, dtype="float16")
    made = report_on(spec)
    assert made.config.dtype == "float32"
    assert "float16" in made.notes[0]
    assert made.ranks[0].total_weight_bytes == 2 * report_on(DENSE).ranks[0].total_weight_bytes


def test_a_second_copy_of_an_expert_is_redundant_where_it_lies_later() -> None:
    placement = np.concatenate([initial_placement(29, 33, 2), np.full((29, 1), 5, dtype=np.int32)], axis=1)
    made = report(question(MOE, tensor_parallel_size=2, enable_expert_parallel=True), placement)
    assert [one.redundant_experts[1] for one in made.ranks] == [(), (5,)]
    assert [5 in one.experts[1] for one in made.ranks] == [True, True]
    plain = report(question(MOE, tensor_parallel_size=2, enable_expert_parallel=True))
    more = made.ranks[1].weight_bytes["experts"] - plain.ranks[1].weight_bytes["experts"]
    assert more == 29 * 3 * 24 * 64 * 2


def test_bytes_count_the_slots_that_a_placement_gives() -> None:
    layout = Layout(tensor_parallel_size=4, enable_expert_parallel=True)
    ranks = rank_reports(layout, MOE, {0: initial_placement(29, 33, 4)}, "float32", "bfloat16")
    one_expert = 3 * 24 * 64 * 4
    assert [one.weight_bytes["experts"] for one in ranks] == [29 * n * one_expert for n in (9, 8, 8, 8)]


@pytest.mark.parametrize("ranks", [(0,), (3, 1)])
def test_some_ranks_alone(ranks: tuple[int, ...]) -> None:
    layout = Layout(tensor_parallel_size=4)
    assert [one.rank for one in rank_reports(layout, DENSE, None, "float32", "float32", ranks)] == list(ranks)
