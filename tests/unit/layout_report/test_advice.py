"""Idle GPUs, memory, and what the report offers."""

from __future__ import annotations

from typing import Any

import pytest

from drumline.engine.config import CacheConfig
from drumline.engine.layout_report.question import parse_bytes
from drumline.protocol.errors import InvalidConfig
from tests.unit.specs import DENSE

from .worlds import LATENT, MOE, question, report_on


@pytest.mark.parametrize("model", ["llama-3-70b", "deepseek-v3"])
def test_four_of_eight_gpus_stay_idle_and_a_second_replica_uses_them(model: str) -> None:
    made = report_on(model, tensor_parallel_size=4, num_gpus=8)
    assert (made.idle_gpus, made.idle_gpu_ids) == (4, (4, 5, 6, 7))
    assert made.suggestion is not None
    assert "4 of 8 GPUs stay idle: add -dp 2 to use all 8" in made.suggestion
    assert [one.change for one in made.alternatives] == ["add -dp 2", "set -tp 8", "add -pp 2"]


def test_nothing_idle_is_nothing_to_say() -> None:
    made = report_on(DENSE, tensor_parallel_size=2, num_gpus=2)
    assert (made.idle_gpus, made.suggestion, made.alternatives) == (0, None, ())


def test_an_alternative_that_cannot_be_says_why() -> None:
    made = report_on(DENSE, tensor_parallel_size=8, num_gpus=16)
    (wider,) = (one for one in made.alternatives if one.change == "set -tp 16")
    assert not wider.valid
    assert "8 attention heads" in wider.reason
    assert wider.weight_bytes is None


def test_experts_that_cannot_be_cut_are_offered_whole() -> None:
    # 24 channels are cut over 2 ranks, and not over 10.
    made = report_on(MOE, tensor_parallel_size=2, num_gpus=10)
    assert made.suggestion is not None
    assert "add -dp 5 --enable-expert-parallel" in made.suggestion


def test_an_uneven_number_of_gpus_is_used_as_far_as_it_goes() -> None:
    made = report_on(DENSE, tensor_parallel_size=4, num_gpus=9)
    assert "add -dp 2 to use 8 of the 9" in (made.suggestion or "")
    other = report_on(DENSE, tensor_parallel_size=4, num_gpus=6)
    assert "set -tp 2 -dp 3 to use all 6" in (other.suggestion or "")


def test_what_a_gpu_has_left_for_kv() -> None:
    cache = CacheConfig(gpu_memory_utilization=0.5)
    made = report_on(DENSE, gpu_memory=64 << 20, cache=cache, max_model_len=100)
    (one,) = made.ranks
    assert one.kv_bytes_free == (32 << 20) - one.total_weight_bytes
    assert one.kv_tokens == one.kv_bytes_free // one.kv_bytes_per_token
    assert made.replicas[0].kv_tokens == one.kv_tokens
    assert made.replicas[0].max_sequences == one.kv_tokens // 100


def test_a_replica_has_the_kv_of_its_smallest_rank() -> None:
    made = report_on(LATENT, pipeline_parallel_size=4, gpu_memory=8 << 20)
    assert made.replicas[0].kv_tokens == min(one.kv_tokens or 0 for one in made.ranks)
    assert len({one.kv_tokens for one in made.ranks}) > 1


def test_weights_that_do_not_fit_and_what_does() -> None:
    made = report_on(
        "deepseek-v3",
        tensor_parallel_size=2,
        pipeline_parallel_size=4,
        enable_expert_parallel=True,
        gpu_memory=80 << 30,
    )
    assert {one.fits for one in made.ranks} == {False}
    assert made.suggestion is not None
    assert "rank 4 does not fit" in made.suggestion
    fitting = [one for one in made.alternatives if one.fits]
    assert {one.num_gpus for one in fitting} == {32}
    # It is offered because it does fit: ask about it.
    wide = report_on(
        "deepseek-v3",
        tensor_parallel_size=8,
        pipeline_parallel_size=4,
        enable_expert_parallel=True,
        gpu_memory=80 << 30,
    )
    assert all(one.fits for one in wide.ranks)
    (offered,) = (one for one in fitting if one.flags == "-tp 8 -pp 4 --enable-expert-parallel")
    assert offered.weight_bytes == max(one.total_weight_bytes for one in wide.ranks)
    assert offered.kv_tokens == sum(one.kv_tokens or 0 for one in wide.replicas)


def test_room_for_less_than_one_sequence_is_said() -> None:
    weights = report_on(DENSE).ranks[0].total_weight_bytes
    cache = CacheConfig(gpu_memory_utilization=1.0)
    made = report_on(DENSE, gpu_memory=weights + 30 * 2 * 2 * 16 * 2 * 50, cache=cache)
    assert "room for 50 tokens" in (made.suggestion or "")
    assert "lower --max-model-len" in (made.suggestion or "")


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("1.5g", 3 << 29), ("4096", 4096), ("512 mib", 512 << 20)],
)
def test_bytes_with_units(text: str, number: int) -> None:
    assert parse_bytes("gpu_memory", text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1", "80XB", "0", "1e9999", "9" * 400, "2000TiB"])
def test_bytes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_bytes("gpu_memory", text)
    assert caught.value.field == "gpu_memory"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("num_gpus", {"tensor_parallel_size": 4, "num_gpus": 3}),
        ("num_gpus", {"num_gpus": 5000}),
        ("data_parallel_size", {"tensor_parallel_size": 8, "data_parallel_size": 1024}),
        ("tensor_parallel_size", {"tensor_parallel_size": 3}),
        ("pipeline_partition", {"pipeline_parallel_size": 2, "pipeline_partition": (15, 16)}),
        ("max_model_len", {"max_model_len": 129}),
        ("enable_expert_parallel", {"enable_expert_parallel": True}),
    ],
)
def test_questions_that_have_no_answer(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig) as caught:
        question(DENSE, **options)
    assert caught.value.field == field
    assert caught.value.valid
