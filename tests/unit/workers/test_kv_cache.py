"""How many blocks the cache gets, and what it says when they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import rank_shards
from drumline.workers import kv_cache
from drumline.workers.kv_cache import KVCache, block_bytes, choose_num_blocks, free_memory
from tests.checkpoints import Checkpoints
from tests.parity.stepdriver import worker_config

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
    cache.values[2][1, 2, 0, 5] = float("inf")
    cache.scrub(torch.tensor([2]))
    assert all(bool(part.isfinite().all()) for part in cache.keys + cache.values)
    assert float(cache.keys[1][:, 2].sum()) == 1.5 * (2 * 8 * 16 - 1)
