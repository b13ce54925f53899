"""Every configuration that cannot work is refused when it is made, with field, found and valid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drumline.engine.config import CacheConfig, EngineConfig, FaultConfig, ParallelConfig, SchedulerConfig
from drumline.protocol.errors import InvalidConfig


def make(cls: Callable[..., object], **values: Any) -> Callable[[], object]:
    return lambda: cls(**values)


REFUSED: list[tuple[Callable[[], object], str, str, str]] = [
    (make(ParallelConfig, data_parallel_size=0), "data_parallel_size", "0", "1 to"),
    (make(ParallelConfig, data_parallel_size=-2), "data_parallel_size", "-2", "1 to"),
    (make(ParallelConfig, data_parallel_size="2"), "data_parallel_size", "2", "whole number"),
    (make(ParallelConfig, data_parallel_size=True), "data_parallel_size", "True", "whole number"),
    (make(ParallelConfig, enable_expert_parallel=1), "enable_expert_parallel", "1", "True or False"),
    (make(ParallelConfig, expert_placement_strategy="zigzag"), "expert_placement_strategy", "zigzag", "round_robin"),
    (make(CacheConfig, block_size=0), "block_size", "0", "1 to"),
    (make(CacheConfig, gpu_memory_utilization=0.0), "gpu_memory_utilization", "0.0", "above 0"),
    (make(CacheConfig, gpu_memory_utilization=1.5), "gpu_memory_utilization", "1.5", "at most 1"),
    (make(CacheConfig, gpu_memory_utilization=float("nan")), "gpu_memory_utilization", "nan", "above 0"),
    (make(CacheConfig, kv_cache_memory_bytes=-1), "kv_cache_memory_bytes", "-1", "None"),
    (make(CacheConfig, num_gpu_blocks_override=0), "num_gpu_blocks_override", "0", "None"),
    (make(CacheConfig, kv_cache_dtype="fp8"), "kv_cache_dtype", "fp8", "auto"),
    (make(SchedulerConfig, max_num_seqs=0), "max_num_seqs", "0", "1 to"),
    (make(SchedulerConfig, max_num_batched_tokens=1.5), "max_num_batched_tokens", "1.5", "whole number"),
    (
        make(SchedulerConfig, max_num_seqs=9, max_num_batched_tokens=8),
        "max_num_batched_tokens",
        "8",
        "max_num_seqs (9)",
    ),
    (make(SchedulerConfig, async_scheduling=None), "async_scheduling", "None", "True or False"),
    (make(SchedulerConfig, max_waiting=0), "max_waiting", "0", "1 to"),
    (make(FaultConfig, step_deadline_s=0), "step_deadline_s", "0", "above 0"),
    (make(FaultConfig, step_deadline_s=float("inf")), "step_deadline_s", "inf", "at most"),
    (make(FaultConfig, start_deadline_s=-1.0), "start_deadline_s", "-1.0", "above 0"),
    (make(EngineConfig, model=""), "model", "", "not empty"),
    (make(EngineConfig, model=7), "model", "7", "string"),
    (make(EngineConfig, model=Path("/models/\udcff")), "model", "udcff", "Unicode"),
    (make(EngineConfig, model="demo", served_model_name="\ud800"), "served_model_name", "ud800", "Unicode"),
    (make(EngineConfig, model="demo", tokenizer=""), "tokenizer", "", "not empty"),
    (make(EngineConfig, model="demo", dtype="float8"), "dtype", "float8", "float32"),
    (make(EngineConfig, model="demo", max_model_len=0), "max_model_len", "0", "None"),
    (make(EngineConfig, model="demo", seed=-1), "seed", "-1", "0 to"),
    (make(EngineConfig, model="demo", parallel=2), "parallel", "2", "ParallelConfig"),
    (make(EngineConfig, model="demo", scheduler=CacheConfig()), "scheduler", "CacheConfig", "SchedulerConfig"),
    (make(EngineConfig, model="demo", journal=""), "journal", "", "not empty"),
    (make(EngineConfig, model="demo", journal=7), "journal", "7", "string"),
    (make(EngineConfig, model="demo", fault_injection=1), "fault_injection", "1", "True or False"),
    (make(FaultConfig, restart_limit=-1), "restart_limit", "-1", "0 to"),
    (make(FaultConfig, coordinator_lease_s=float("nan")), "coordinator_lease_s", "nan", "0"),
    (make(FaultConfig, resume_window_s=-1), "resume_window_s", "-1", "0"),
    (make(FaultConfig, expert_growth_bytes=-1), "expert_growth_bytes", "-1", "None"),
    (make(EngineConfig, model="demo", endpoint="tcp://*:1"), "endpoint", "tcp://*:1", "None"),
    (make(EngineConfig, model="demo", inline="yes"), "inline", "yes", "True or False"),
    (
        make(
            EngineConfig,
            model="demo",
            max_model_len=4096,
            scheduler=SchedulerConfig(enable_chunked_prefill=False),
        ),
        "max_num_batched_tokens",
        "2048",
        "max_model_len (4096)",
    ),
]


@pytest.mark.parametrize(("build", "field", "found", "valid"), REFUSED, ids=[f"{r[1]}={r[2]}" for r in REFUSED])
def test_what_cannot_work_is_refused_with_its_figures(
    build: Callable[[], object], field: str, found: str, valid: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        build()
    assert caught.value.info.field == field
    assert found in caught.value.info.found
    assert valid in caught.value.info.valid
    assert field in caught.value.text


def test_a_configuration_survives_the_way_to_another_process() -> None:
    config = EngineConfig(
        "demo",
        seed=3,
        parallel=ParallelConfig(data_parallel_size=2, enable_expert_parallel=True),
        faults=FaultConfig(step_deadline_s=7.5),
        inline=True,
    )
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


def test_a_configuration_is_checked_again_when_it_is_decoded() -> None:
    raw = msgspec.json.encode(EngineConfig("demo")).replace(b'"data_parallel_size":1', b'"data_parallel_size":0')
    with pytest.raises(msgspec.ValidationError, match="data_parallel_size: found 0"):
        msgspec.json.decode(raw, type=EngineConfig)


def test_a_path_is_taken_for_a_folder_or_a_journal() -> None:
    config = EngineConfig(Path("/models/x"), journal=Path("/var/j"))  # type: ignore[arg-type]
    assert (config.model, config.journal) == ("/models/x", "/var/j")


def test_defaults_are_those_of_the_documentation() -> None:
    config = EngineConfig("demo")
    assert (config.dtype, config.seed, config.journal, config.inline) == ("auto", 0, None, False)
    assert (config.cache.block_size, config.cache.gpu_memory_utilization) == (16, 0.9)
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (256, 2048)
    assert config.scheduler.enable_chunked_prefill
    assert config.scheduler.async_scheduling
