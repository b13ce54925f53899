"""The sentences, by the questions that people ask."""

from __future__ import annotations

from typing import Any

from drumline.engine.layout_report.explain import explain
from drumline.engine.layout_report.report import report
from drumline.protocol.modelspec import ModelSpec
from tests.unit.specs import DENSE

from .worlds import LATENT, MOE, question


def told(model: ModelSpec | str, **options: Any) -> dict[str, str]:
    asked = question(model, **options)
    return {topic.title: topic.text for topic in explain(asked, report(asked))}


def test_are_attention_weights_replicated() -> None:
    alone = told(MOE, tensor_parallel_size=2)["Attention weights"]
    assert "sharded over the 2 ranks" in alone
    assert "one copy" in alone
    several = told(MOE, data_parallel_size=4, enable_expert_parallel=True)["Attention weights"]
    assert "whole on every rank" in several
    assert "replicated over dp 4: 4 copies" in several
    split = told(DENSE, tensor_parallel_size=4, enable_dp_attention=True)["Attention weights"]
    assert "dp 1 x attention dp 2: 2 copies" in split


def test_what_do_the_other_four_gpus_do() -> None:
    text = told(DENSE, tensor_parallel_size=4, num_gpus=8)["Idle GPUs"]
    assert "of 8 GPUs 4 stay idle (GPU 4-7)" in text
    assert "add -dp 2" in text


def test_a_refused_way_to_use_them_is_explained() -> None:
    text = told(DENSE, tensor_parallel_size=8, num_gpus=16)["Idle GPUs"]
    assert "Not possible: set -tp 16" in text


def test_why_ep_is_tp_times_dp_and_within_a_stage() -> None:
    text = told("deepseek-v3", tensor_parallel_size=2, pipeline_parallel_size=4, enable_expert_parallel=True)["Experts"]
    assert "ep = tp 2 x dp 1 = 2" in text
    assert "128 of the 256 experts of each MoE layer" in text
    assert "Only within a stage" in text


def test_experts_without_expert_parallel() -> None:
    text = told(MOE, data_parallel_size=2, tensor_parallel_size=2)["Experts"]
    assert "tensor-sharded over the dp 2 x tp 2 = 4 ranks" in text
    assert "6 of 24 channels of all 33 experts" in text
    assert "8 or 9 of them per layer, so that some ranks hold more bytes" in text
    assert "whole on the one rank" in told(MOE)["Experts"]
    even = told("mixtral-8x7b", tensor_parallel_size=4)["Experts"]
    assert "2 of them per layer, in as many bytes" in even


def test_expert_parallel_is_not_offered_where_it_would_be_refused() -> None:
    text = told("mixtral-8x7b", data_parallel_size=4, tensor_parallel_size=4)["Experts"]
    assert "not possible with 16 ranks: each would need one of the 8 experts" in text
    assert "0 or 1" not in text


def test_kv_heads_that_are_too_few() -> None:
    both = told(DENSE, tensor_parallel_size=4)
    assert "2 ranks hold the same one" in both["KV heads"]
    assert "would form 2 attention replicas of 2" in both["Attention data parallel"]
    assert "Attention data parallel" not in told(DENSE, tensor_parallel_size=2)
    on = told(DENSE, tensor_parallel_size=4, enable_dp_attention=True)
    assert "none held twice" in on["KV heads"]
    assert "2 attention replicas of 2" in on["Attention data parallel"]
    assert "changes nothing" in told(DENSE, enable_dp_attention=True)["Attention data parallel"]


def test_one_latent_for_all_heads() -> None:
    text = told(LATENT, tensor_parallel_size=2)["KV heads"]
    assert "40 + 8 = 48 numbers" in text
    assert "each of the 2 ranks" in text
    assert "sharded over tp 2, 12 channels" in told(LATENT, tensor_parallel_size=2)["Shared experts"]


def test_how_layers_are_split() -> None:
    text = told(DENSE, pipeline_parallel_size=4)["Layers"]
    assert "30 layers over 4 stages: 7 each, and the 2 left over" in text
    assert "7, 8, 8, 7" in text
    given = told(DENSE, pipeline_parallel_size=2, pipeline_partition=(10, 20))["Layers"]
    assert "as --pipeline-partition says: 10, 20" in given


def test_who_waits_for_whom() -> None:
    assert "dummy steps" in told(MOE, data_parallel_size=2)["Data parallel"]
    assert "share nothing" in told(DENSE, data_parallel_size=2)["Data parallel"]
    assert "Data parallel" not in told(DENSE)


def test_the_room_for_kv() -> None:
    assert "--gpu-memory" in told(DENSE)["KV cache"]
    text = told(DENSE, gpu_memory=64 << 20)["KV cache"]
    assert "30 layers x 64 numbers x 2 bytes" in text
    assert "Activations and workspace" in text
    assert "too much" in told("llama-3-70b", gpu_memory=24 << 30)["KV cache"]
