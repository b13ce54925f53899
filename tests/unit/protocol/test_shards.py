from __future__ import annotations

import msgspec
import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.padding import gather_plan, slice_counts
from drumline.protocol.placement import PlacementMaps, initial_placement
from drumline.protocol.shards import (
    attention_replicas,
    check_model,
    divisors,
    kv_head_span,
    layer_split,
    rank_shards,
    split,
)
from tests.unit.specs import DENSE, EXPERTS

SPEC = msgspec.structs.replace(
    DENSE, architecture="Qwen3MoeForCausalLM", num_kv_heads=4, qk_norm=True, dtype="float32", moe=EXPERTS
)


def sizes(spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - start for start, end in spans]


@pytest.mark.parametrize(
    ("layers", "stages", "partition", "expected"),
    [
        (30, 4, (), [7, 8, 8, 7]),
        (7, 3, (), [2, 3, 2]),
        (61, 4, (), [15, 15, 16, 15]),
        (5, 2, (), [3, 2]),
        (7, 4, (), [2, 2, 2, 1]),
        (8, 4, (), [2, 2, 2, 2]),
        (7, 3, (1, 5, 1), [1, 5, 1]),
    ],
)
def test_the_middle_stages_take_the_layers_that_are_left(
    layers: int, stages: int, partition: tuple[int, ...], expected: list[int]
) -> None:
    spans = layer_split(layers, stages, partition)
    assert sizes(spans) == expected
    assert spans[0][0] == 0
    assert spans[-1][1] == layers


@pytest.mark.parametrize(
    ("stages", "partition", "field"),
    [
        (8, (), "pipeline_parallel_size"),
        (0, (), "pipeline_parallel_size"),
        (2, (3, 3), "pipeline_partition"),
        (2, (7, 0), "pipeline_partition"),
        (2, (7,), "pipeline_partition"),
    ],
)
def test_a_split_that_leaves_a_stage_empty_or_does_not_add_up_is_refused(
    stages: int, partition: tuple[int, ...], field: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        layer_split(7, stages, partition)
    assert caught.value.field == field


def test_parts_of_a_split_cover_it_without_gap() -> None:
    assert [split(250, 4, part) for part in range(4)] == [(0, 63), (63, 126), (126, 188), (188, 250)]
    assert [split(1, 2, part) for part in range(2)] == [(0, 1), (1, 1)]


def test_few_kv_heads_are_held_by_several_ranks() -> None:
    assert [kv_head_span(2, 4, rank) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [kv_head_span(4, 2, rank) for rank in range(2)] == [(0, 2), (2, 4)]
    assert [attention_replicas(tp, heads) for tp, heads in ((4, 2), (2, 1), (8, 8), (2, 8))] == [2, 2, 1, 1]


def test_query_heads_stand_with_their_kv_head() -> None:
    spec = msgspec.structs.replace(SPEC, num_kv_heads=2)
    layout = Layout(tensor_parallel_size=8, enable_expert_parallel=True)
    group = spec.num_heads // spec.num_kv_heads
    for rank in range(8):
        shards = rank_shards(layout, spec, rank)
        assert shards.kv_replicated
        assert shards.q_heads[0] // group == (shards.q_heads[1] - 1) // group == shards.kv_heads[0]


def test_experts_are_cut_over_dp_and_tp_when_expert_parallel_is_off() -> None:
    shards = [rank_shards(Layout(2, 1, 2), SPEC, rank) for rank in range(4)]
    assert [one.expert_mlp for one in shards] == [(0, 6), (6, 12), (12, 18), (18, 24)]
    assert [one.mlp for one in shards] == [(0, 48), (48, 96)] * 2
    on = rank_shards(Layout(2, 1, 2, enable_expert_parallel=True), SPEC, 3)
    assert (on.expert_mlp, on.ep_rank) == ((0, 24), 3)


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_33_experts_over_4_ranks(strategy: str) -> None:
    maps = PlacementMaps.build(initial_placement(1, 33, 4, strategy), 33, 4)
    held = [[int(e) for e in maps.physical_to_logical[0, list(maps.local_slots(rank))]] for rank in range(4)]
    assert [len(experts) for experts in held] == [9, 8, 8, 8]
    expected = list(range(9)) if strategy == "linear" else list(range(0, 33, 4))
    assert held[0] == expected
    assert sorted(expert for experts in held for expert in experts) == list(range(33))


@pytest.mark.parametrize(
    ("layout", "changes", "field", "valid"),
    [
        (Layout(tensor_parallel_size=3), {}, "tensor_parallel_size", "1, 2, 4, 8"),
        (Layout(tensor_parallel_size=8), {"num_kv_heads": 3, "num_heads": 24}, "tensor_parallel_size", "1, 3, 6, 12"),
        (Layout(tensor_parallel_size=8), {"intermediate_size": 100}, "tensor_parallel_size", "one of 1, 2, 4:"),
        (Layout(data_parallel_size=5), {}, "data_parallel_size", "1, 2, 3, 4, 6, 8, 12, 24"),
        (Layout(data_parallel_size=34, enable_expert_parallel=True), {}, "data_parallel_size", "1 to 33"),
        (Layout(pipeline_parallel_size=31), {}, "pipeline_parallel_size", "1 to 30"),
        (Layout(enable_expert_parallel=True), {"moe": None}, "enable_expert_parallel", "False"),
    ],
)
def test_a_layout_that_the_model_cannot_be_cut_by_names_what_would_do(
    layout: Layout, changes: dict[str, object], field: str, valid: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        check_model(layout, msgspec.structs.replace(SPEC, **changes))
    assert caught.value.field == field
    assert valid in caught.value.info.valid


def test_a_layout_with_all_kinds_of_parallelism_is_accepted() -> None:
    check_model(Layout(2, 3, 4, enable_expert_parallel=True, attention_data_parallel_size=2), SPEC)


def test_divisors_ascend() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]


def test_shares_are_padded_while_half_of_the_rows_are_real() -> None:
    padded = gather_plan([5, 3, 5])
    assert (padded.rows, padded.waste, padded.padded) == ((5, 5, 5), 2, True)
    packed = gather_plan([9, 1, 0])
    assert (packed.rows, packed.waste, packed.padded) == ((9, 1, 0), 0, False)
    assert gather_plan([]).waste == gather_plan([0, 0]).waste == 0
    assert not gather_plan([4, 4]).padded


def test_the_ranks_of_a_replica_share_out_its_tokens() -> None:
    assert slice_counts([5, 0, 2], 2) == [3, 2, 0, 0, 1, 1]
