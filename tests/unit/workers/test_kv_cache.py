"""How many blocks the cache gets, and what it says when they do not fit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from drumline.engine.layout_report.ranks import rank_reports
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import initial_placement
from drumline.protocol.shards import rank_shards
from drumline.workers import kv_cache
from drumline.workers.kv_cache import KVCache, block_bytes, choose_num_blocks, free_memory, kv_dtype
from tests.checkpoints import Checkpoints
from tests.parity.forced import errors, forced_logits
from tests.parity.stepdriver import StepDriver, loaded_runner, worker_config

CPU = torch.device("cpu")
# 3 layers, keys and values, 2 kv heads of 16 float32, and an int32 token id.
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4 + 4


@pytest.fixture
def spec(checkpoints: Checkpoints) -> ModelSpec:
    return ModelSpec.from_folder(checkpoints("qwen3-moe"))


def blocks(spec: ModelSpec, checkpoints: Checkpoints, **changes: Any) -> int:
    config = worker_config(checkpoints("qwen3-moe"), **({"num_blocks": 0} | changes))
    return choose_num_blocks(config, spec, rank_shards(Layout(), spec, 0), torch.float32, CPU)


def test_a_block_counts_keys_values_and_token_ids(spec: ModelSpec) -> None:
    assert block_bytes(spec, rank_shards(Layout(), spec, 0), 8, torch.float32) == 8 * TOKEN_BYTES


@pytest.mark.parametrize("name", ["llama-kv2", "qwen3-moe-wide", "deepseek-v3-wide"])
def test_every_rank_of_a_layout_holds_the_kv_bytes_per_token_that_are_told(name: str, checkpoints: Checkpoints) -> None:
    spec = ModelSpec.from_folder(checkpoints(name))
    for layout in (
        Layout(tensor_parallel_size=2, pipeline_parallel_size=3),
        Layout(tensor_parallel_size=4),
        Layout(tensor_parallel_size=4, attention_data_parallel_size=2),
    ):
        placement = initial_placement(len(spec.moe_layers), spec.num_experts, layout.ep_size, "linear")
        for told in rank_reports(layout, spec, placement if spec.is_moe else None, "float32", "bfloat16"):
            cache = KVCache(spec, rank_shards(layout, spec, told.rank), 3, 8, torch.bfloat16, CPU)
            parts = [part for part in (*cache.keys, *cache.values) if part is not None]
            assert sum(part.nbytes for part in parts) == 3 * 8 * told.kv_bytes_per_token


def test_by_default_every_row_can_reach_the_longest_length(spec: ModelSpec, checkpoints: Checkpoints) -> None:
    assert blocks(spec, checkpoints, max_num_seqs=5, max_model_len=100, block_size=16) == 5 * 7


@pytest.mark.parametrize(
    ("free", "local_ranks", "budget"),
    [(64 << 30, 1, 1 << 30), (64 << 30, 4, 1 << 30), (2 << 30, 1, 512 << 20), (2 << 30, 4, 128 << 20)],
)
def test_the_default_stops_at_one_gibibyte_and_at_the_share_of_a_quarter_of_the_free_memory(
    spec: ModelSpec,
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    local_ranks: int,
    budget: int,
) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: free)
    found = blocks(spec, checkpoints, max_num_seqs=10_000, max_model_len=512, local_ranks=local_ranks)
    assert found == budget // (8 * TOKEN_BYTES)


def test_too_little_free_memory_says_which_length_would_fit(
    spec: ModelSpec, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 8 * TOKEN_BYTES * 4 * 10)
    with pytest.raises(InvalidConfig, match="max_model_len of at most 80"):
        blocks(spec, checkpoints, max_model_len=100)


def test_the_free_memory_of_this_machine_is_a_sensible_number() -> None:
    assert 1 << 20 < free_memory(CPU) < 1 << 50


def test_a_given_number_of_blocks_is_taken(spec: ModelSpec, checkpoints: Checkpoints) -> None:
    assert blocks(spec, checkpoints, num_blocks=3) == 3


def test_bytes_are_divided_into_blocks(spec: ModelSpec, checkpoints: Checkpoints) -> None:
    budget = 8 * TOKEN_BYTES * 40 + 17
    assert blocks(spec, checkpoints, kv_cache_memory_bytes=budget, max_model_len=64, max_num_seqs=100) == 40


def test_too_few_bytes_say_what_would_fit(spec: ModelSpec, checkpoints: Checkpoints) -> None:
    size = 8 * TOKEN_BYTES
    with pytest.raises(InvalidConfig) as caught:
        blocks(spec, checkpoints, kv_cache_memory_bytes=size * 5 + 1, max_model_len=256)
    assert caught.value.field == "kv_cache_memory_bytes"
    assert f"{32 * size} bytes" in caught.value.info.valid
    assert "max_model_len of at most 40" in caught.value.info.valid
    assert f"{size * 5 + 1} bytes" in caught.value.info.found


def test_more_than_the_free_memory_is_refused(spec: ModelSpec, checkpoints: Checkpoints) -> None:
    with pytest.raises(InvalidConfig, match=r"num_gpu_blocks_override.*at most"):
        blocks(spec, checkpoints, num_blocks=1 << 40)
    with pytest.raises(InvalidConfig, match=r"kv_cache_memory_bytes.*at most"):
        blocks(spec, checkpoints, kv_cache_memory_bytes=1 << 50)


def test_scrubbing_leaves_no_nan_behind_and_good_numbers_alone(spec: ModelSpec) -> None:
    cache = KVCache(spec, rank_shards(Layout(), spec, 0), 4, 8, torch.float32, CPU)
    cache.keys[1][:, 2].fill_(1.5)
    cache.keys[1][0, 2, 3, 0] = float("nan")
    values = cache.values[2]
    assert values is not None
    values[1, 2, 0, 5] = float("inf")
    cache.scrub(torch.tensor([2]))
    assert all(bool(part.isfinite().all()) for part in (*cache.keys, values))
    assert float(cache.keys[1][:, 2].sum()) == 1.5 * (2 * 8 * 16 - 1)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_cache_is_in_what_is_computed_in_unless_it_is_said(compute: torch.dtype) -> None:
    assert kv_dtype("auto", compute) == compute
    assert kv_dtype("bfloat16", compute) == torch.bfloat16
    assert kv_dtype("float32", compute) == torch.float32


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "float16", "int8", ""])
def test_another_cache_dtype_is_refused_by_name(name: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(InvalidConfig, match="valid: auto, float32, bfloat16") as caught:
        loaded_runner(worker_config(checkpoints("llama"), kv_cache_dtype=name))
    assert (caught.value.field, caught.value.info.found) == ("kv_cache_dtype", name)


@pytest.mark.parametrize("name", ["llama", "deepseek-v3"])
def test_a_float32_model_runs_on_a_bfloat16_cache_of_half_the_bytes(name: str, checkpoints: Checkpoints) -> None:
    text, logits, sizes = [token * 7 % 250 for token in range(60)], {}, {}
    for dtype in ("auto", "bfloat16"):
        runner = loaded_runner(worker_config(checkpoints(name), kv_cache_dtype=dtype))
        parts = [part for part in (*runner.cache.keys, *runner.cache.values) if part is not None]
        assert {part.dtype for part in parts} == {kv_dtype(dtype, torch.float32)}
        sizes[dtype] = sum(part.nbytes for part in parts)
        driver = StepDriver([[runner]])
        logits[dtype] = forced_logits(driver, text, 50)
        driver.close()
    assert sizes["auto"] == 2 * sizes["bfloat16"]
    median = float(errors(logits["bfloat16"], logits["auto"]).median())
    assert 1e-4 < median < 5e-2


@pytest.mark.parametrize("name", ["llama", "deepseek-v3"])
@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
def test_what_a_prompt_becomes_does_not_depend_on_its_chunks(name: str, cache: str, checkpoints: Checkpoints) -> None:
    text, logits = [token * 7 % 250 for token in range(60)], []
    for budget in (8, 64):
        config = worker_config(checkpoints(name), kv_cache_dtype=cache, max_num_batched_tokens=budget)
        driver = StepDriver([[loaded_runner(config)]])
        # Every budget that the driver draws: one chunk of 60, or eight of 8.
        with mock.patch.object(driver.random, "choice", return_value=budget):
            logits.append(forced_logits(driver, text, 60))
        assert driver.counts["chunks"] == (7 if budget == 8 else 0)
        driver.close()
    assert float(errors(*logits).max()) < 1e-4
