"""What the ranks of every layout really hold is what the arithmetic of ``drumline layout`` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import check_model, rank_shards
from drumline.protocol.weights import ModelWeights
from drumline.workers.held_bytes import held_bytes
from tests.checkpoints import Checkpoints
from tests.unit.workers.pieces import empty_model, placement_maps

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
    "pp3": {"pipeline_parallel_size": 3},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "dp2-tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "dp2-tp2-ep": {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True},
    "dp2-pp2-ep": {"data_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
    "dp3-ep": {"data_parallel_size": 3, "enable_expert_parallel": True},
    "tp4-attn-dp2": {"tensor_parallel_size": 4, "attention_data_parallel_size": 2},
    "dp2-tp2-attn-dp2": {"data_parallel_size": 2, "tensor_parallel_size": 2, "attention_data_parallel_size": 2},
}
MODELS = (
    "llama-wide",
    "llama-kv2",
    "qwen2-wide",
    "qwen3-wide",
    "qwen3-moe-wide",
    "mixtral-wide",
    "deepseek-v2-wide",
    "deepseek-v3-wide",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def expected_bytes(spec: ModelSpec, layout: Layout, rank: int, dtype: str) -> int:
    shards, maps = rank_shards(layout, spec, rank), placement_maps(spec, layout)
    slots = dict.fromkeys(spec.moe_layers, len(maps.local_slots(shards.ep_rank)) if spec.is_moe else 0)
    return sum(ModelWeights(spec).bytes_by_kind(shards, slots, dtype, "cpu").values())


def head_norm_rows(spec: ModelSpec, layout: Layout, rank: int, dtype: str) -> int:
    """Norms of queries and keys are held once per head, so that one product does for all."""
    shards = rank_shards(layout, spec, rank)
    heads = sum(end - start for start, end in (shards.q_heads, shards.kv_heads))
    return shards.num_layers * (heads - 2) * spec.head_dim * DTYPES[dtype].itemsize if spec.qk_norm else 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_of_every_layout_holds_the_bytes_that_are_told(
    name: str, dtype: str, checkpoints: Checkpoints
) -> None:
    folder = checkpoints(name)
    spec = ModelSpec.from_folder(folder)
    for title, sizes in LAYOUTS.items():
        layout = Layout(
            **(sizes | {"enable_expert_parallel": sizes.get("enable_expert_parallel", False) and spec.is_moe})
        )
        check_model(layout, spec)
        for rank in range(layout.num_ranks):
            told = expected_bytes(spec, layout, rank, dtype)
            held = held_bytes(empty_model(folder, layout, rank, dtype=DTYPES[dtype]))
            assert held - head_norm_rows(spec, layout, rank, dtype) == told, f"{title}, rank {rank}"
            assert abs(held - told) <= 0.01 * told


def test_a_weight_that_nobody_counted_would_show(checkpoints: Checkpoints) -> None:
    folder = checkpoints("deepseek-v3-wide")
    model = empty_model(folder, Layout(tensor_parallel_size=2))
    before = held_bytes(model)
    model.layers[3].post_norm.weight = torch.ones(8)
    assert held_bytes(model) == before - (64 - 8) * 4
    model.layers[3].attention.out.bias = torch.ones(64)
    assert held_bytes(model) == before - (64 - 8) * 4 + 64 * 4


def test_packing_changes_nothing_and_tied_embeddings_count_once(checkpoints: Checkpoints) -> None:
    for name in ("qwen3-wide", "llama-wide"):
        spec = ModelSpec.from_folder(checkpoints(name))
        model = empty_model(checkpoints(name))
        before = held_bytes(model)
        model.finish_loading()
        assert held_bytes(model) == before
        embedding = spec.vocab_size * spec.hidden_size * 4
        assert held_bytes(model) > embedding
        assert model.head is not None
        assert model.embedding is not None
        tied = model.head.linear.weight.data_ptr() == model.embedding.weight.data_ptr()
        assert tied == spec.tie_word_embeddings
