"""The model folder is read and checked before any process starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from drumline.engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from drumline.engine.resolve import model_folder, resolve
from drumline.protocol.codec import config_digest
from drumline.protocol.errors import InvalidConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model that may be broken."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder("demo"), copy)
    return copy


def refusal(config: EngineConfig) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        resolve(config)
    assert caught.value.info.field
    assert caught.value.info.found
    assert caught.value.info.valid
    return caught.value


def edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_demo_model_resolves_over_two_ranks_with_expert_parallelism() -> None:
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True)
    resolved = resolve(EngineConfig("demo", parallel=parallel))
    assert resolved.groups == ((0, 1),)
    assert resolved.core.lockstep
    placement = resolved.placements[0]
    assert placement.shape == (len(resolved.spec.moe_layers), resolved.spec.num_experts)
    assert (np.sort(placement, axis=1) == np.arange(resolved.spec.num_experts)).all()
    assert resolved.worker.local_ranks == 2
    assert resolved.tokenizer is not None
    assert resolved.read_tokenizer().startswith(b"{")
    assert resolved.model_info(1000).max_prompt_tokens == resolved.core.max_model_len - 1
    assert resolved.model_info(2).max_prompt_tokens == 31


def test_round_robin_places_experts_alternately() -> None:
    parallel = ParallelConfig(
        data_parallel_size=2, enable_expert_parallel=True, expert_placement_strategy="round_robin"
    )
    placement = resolve(EngineConfig("demo", parallel=parallel)).placements[0]
    half = placement.shape[1] // 2
    assert (placement[0, :half] % 2 == 0).all()


def test_the_digest_tells_configurations_apart() -> None:
    assert resolve(EngineConfig("demo")).digest == resolve(EngineConfig("demo")).digest
    assert resolve(EngineConfig("demo")).digest != resolve(EngineConfig("demo", seed=1)).digest
    assert resolve(EngineConfig("demo")).digest != resolve(EngineConfig("demo", max_model_len=512)).digest


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refusal(EngineConfig(str(tmp_path / "nowhere"))).text


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(EngineConfig(str(folder))).text


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "JSON" in refusal(EngineConfig(str(folder))).text


def test_a_pipe_in_place_of_a_tokenizer_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer.json")
    assert "no regular file" in refusal(EngineConfig(str(folder))).text


def test_an_unsupported_architecture_lists_the_supported_ones(folder: Path) -> None:
    edit(folder, architectures=["MambaForCausalLM"])
    error = refusal(EngineConfig(str(folder)))
    assert "MambaForCausalLM" in error.text
    for name in ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"):
        assert name in error.info.valid


def test_a_checkpoint_that_is_cut_short_names_both_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    text = refusal(EngineConfig(str(folder))).text
    assert str(size) in text
    assert str(size - 100) in text


def test_experts_that_cannot_be_cut_over_the_replicas_are_refused() -> None:
    error = refusal(EngineConfig("demo", parallel=ParallelConfig(data_parallel_size=7)))
    assert error.info.field == "data_parallel_size"
    assert "enable_expert_parallel" in error.info.valid


def test_without_expert_parallelism_every_rank_holds_a_slice_of_every_expert() -> None:
    resolved = resolve(EngineConfig("demo", parallel=ParallelConfig(data_parallel_size=2)))
    assert resolved.groups == ((0, 1),)
    assert resolved.layout.ep_size == 1
    assert (resolved.placements[0] == np.arange(resolved.spec.num_experts)).all()


def test_the_ranks_are_told_the_whole_layout() -> None:
    parallel = ParallelConfig(
        data_parallel_size=2,
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        pipeline_partition=(3, 1),
        enable_dp_attention=True,
        enable_expert_parallel=True,
        all2all_backend="all_to_all",
        data_parallel_size_local=1,
        data_parallel_rank=1,
        data_parallel_rank_local=3,
        max_parallel_loading_workers=2,
        worker_cls="mine.Worker",
        worker_extension_cls="mine:Extension",
        distributed_timeout=7,
    )
    resolved = resolve(EngineConfig("demo", parallel=parallel, cache=CacheConfig(kv_cache_dtype="bfloat16")))
    worker, layout = resolved.worker, resolved.layout
    assert (layout.attention_data_parallel_size, layout.pipeline_partition, layout.num_replicas) == (2, (3, 1), 4)
    assert (worker.attention_data_parallel_size, worker.pipeline_partition) == (2, (3, 1))
    assert (worker.tensor_parallel_size, worker.pipeline_parallel_size, worker.data_parallel_size) == (4, 2, 2)
    assert (worker.all2all_backend, worker.kv_cache_dtype) == ("all_to_all", "bfloat16")
    assert worker.distributed_timeout_s == 7.0
    assert (worker.worker_cls, worker.worker_extension_cls) == ("mine.Worker", "mine:Extension")
    assert (worker.first_local_rank, worker.first_local_device, worker.local_ranks) == (8, 24, 16)
    assert worker.max_parallel_loading_workers == 2
    assert resolved.warnings == ()


def test_attention_replicas_that_come_to_one_are_told() -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, enable_dp_attention=True)
    (warning,) = resolve(EngineConfig("demo", parallel=parallel)).warnings
    assert "enable_dp_attention changes nothing" in warning


def test_the_runtime_folder_is_told_to_the_ranks_and_is_part_of_the_digest() -> None:
    resolved = resolve(EngineConfig("demo"))
    inside = resolved.in_folder("/tmp/drumline-x")
    assert inside.worker.runtime_dir == "/tmp/drumline-x"
    assert inside.digest != resolved.digest
    assert inside.digest == config_digest(inside.worker)


def test_more_ranks_than_experts_are_refused() -> None:
    parallel = ParallelConfig(data_parallel_size=64, enable_expert_parallel=True)
    assert refusal(EngineConfig("demo", parallel=parallel)).info.field == "data_parallel_size"


def test_a_context_beyond_the_models_is_refused() -> None:
    longest = resolve(EngineConfig("demo")).spec.max_position_embeddings
    error = refusal(EngineConfig("demo", max_model_len=longest + 1))
    assert (error.info.field, error.info.found) == ("max_model_len", str(longest + 1))
    assert str(longest) in error.info.valid


def test_without_chunked_prefill_a_step_must_hold_the_models_context() -> None:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, enable_chunked_prefill=False)
    assert refusal(EngineConfig("demo", scheduler=scheduler)).info.field == "max_num_batched_tokens"


def test_a_model_without_tokenizer_is_served_by_token_ids(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    resolved = resolve(EngineConfig(str(folder)))
    assert resolved.tokenizer is None
    assert resolved.read_tokenizer() == b""
    assert not resolved.model_info(100).has_tokenizer


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": "1.0"}'])
def test_a_tokenizer_that_was_asked_for_must_be_one(folder: Path, content: str | None) -> None:
    path = folder / "other.json"
    if content is not None:
        path.write_text(content)
    error = refusal(EngineConfig(str(folder), tokenizer=str(path)))
    assert error.info.field == "tokenizer"


def test_a_tokenizer_folder_is_taken(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    shutil.move(folder / "tokenizer.json", other / "tokenizer.json")
    assert resolve(EngineConfig(str(folder), tokenizer=str(other))).tokenizer == (other / "tokenizer.json").resolve()


@pytest.mark.parametrize(
    ("stored", "asked", "computed", "warned"),
    [
        ("float32", "auto", "float32", False),
        ("bfloat16", "auto", "bfloat16", False),
        ("float16", "auto", "float32", True),
        ("float16", "bfloat16", "bfloat16", False),
        ("float32", "bfloat16", "bfloat16", False),
        ("bfloat16", "float32", "float32", False),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_it_is_a_half(
    folder: Path, stored: str, asked: str, computed: str, warned: bool
) -> None:
    edit(folder, torch_dtype=stored)
    resolved = resolve(EngineConfig(str(folder), dtype=asked))
    assert resolved.worker.dtype == computed
    assert any(stored in warning and computed in warning for warning in resolved.warnings) is warned
