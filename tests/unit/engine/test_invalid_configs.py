"""Configurations that cannot work: each is refused with its field, what was found, and a value that does work."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from drumline.engine.config import CacheConfig, EngineConfig, EPLBConfig, FaultConfig, ParallelConfig, SchedulerConfig
from drumline.engine.known_models import known_spec
from drumline.engine.parallel_config import NOT_YET
from drumline.engine.parallel_layout import parallel_layout
from drumline.engine.resolve import model_folder, resolve
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import ModelSpec

_PARTS: dict[str, type] = {
    name: cls
    for cls in (ParallelConfig, EPLBConfig, CacheConfig, SchedulerConfig, FaultConfig)
    for name in cls.__struct_fields__
}
_NAMES: dict[type, str] = {
    EPLBConfig: "eplb_config",
    ParallelConfig: "parallel",
    CacheConfig: "cache",
    SchedulerConfig: "scheduler",
    FaultConfig: "faults",
}


class Case(msgspec.Struct):
    """``settings`` (flat) are refused because of ``field``; with ``repair`` put there they work. ``repair`` must stand
    in the message. ``model``: changes to the demo model's config.json, None for what is refused without a model."""

    settings: dict[str, Any]
    field: str
    repair: Any
    model: dict[str, Any] | None = None


def alone(field: str, repair: Any, **settings: Any) -> Case:
    return Case(settings, field, repair)


def with_model(field: str, repair: Any, model: dict[str, Any] | None = None, **settings: Any) -> Case:
    return Case(settings, field, repair, model or {})


DENSE = {"architectures": ["Qwen3ForCausalLM"]}
SEVEN_LAYERS = {"num_hidden_layers": 7}
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
TEN_HEADS = {"num_attention_heads": 10, "num_key_value_heads": 2}
EP: dict[str, Any] = {"enable_expert_parallel": True}
EPLB: dict[str, Any] = {**EP, "enable_eplb": True}

CASES = [
    alone("data_parallel_size", 1, data_parallel_size=0),
    alone("data_parallel_size", 4096, data_parallel_size=4097),
    alone("data_parallel_size", 4, data_parallel_size=8, tensor_parallel_size=64, pipeline_parallel_size=64),
    alone("tensor_parallel_size", 1, tensor_parallel_size=-1),
    alone("tensor_parallel_size", 4, tensor_parallel_size=8, pipeline_parallel_size=4096),
    alone("pipeline_parallel_size", 1, pipeline_parallel_size="2"),
    alone("enable_expert_parallel", True, enable_expert_parallel=1),
    alone("expert_placement_strategy", "round_robin", **EP, expert_placement_strategy="random"),
    alone("expert_placement_strategy", "linear", expert_placement_strategy="round_robin"),
    alone("enable_dp_attention", False, enable_dp_attention="yes"),
    alone("pipeline_partition", None, pipeline_partition=(2, 2)),
    alone("pipeline_partition", None, pipeline_parallel_size=2, pipeline_partition=(2, 0)),
    alone("pipeline_partition", None, pipeline_parallel_size=2, pipeline_partition="2,2"),
    alone("data_parallel_size_local", 2, data_parallel_size=2, data_parallel_size_local=3),
    alone("data_parallel_size_local", 1, data_parallel_size=2, data_parallel_size_local=0),
    alone(
        "data_parallel_size_local", None, distributed_executor_backend="external_launcher", data_parallel_size_local=1
    ),
    alone("data_parallel_rank", 0, data_parallel_size=2, data_parallel_rank=1),
    alone("data_parallel_rank", 1, data_parallel_size=2, data_parallel_size_local=1, data_parallel_rank=2),
    alone(
        "data_parallel_rank",
        0,
        data_parallel_size=2,
        distributed_executor_backend="external_launcher",
        data_parallel_rank=1,
    ),
    alone("data_parallel_rank_local", None, data_parallel_rank_local=-1),
    alone(
        "data_parallel_rank_local", None, distributed_executor_backend="external_launcher", data_parallel_rank_local=1
    ),
    alone("data_parallel_master_ip", "127.0.0.1", data_parallel_master_ip="0.0.0.0"),
    alone("data_parallel_master_ip", "127.0.0.1", data_parallel_master_ip="192.168.0.7"),
    alone("data_parallel_master_ip", "127.0.0.1", data_parallel_master_ip="node-7"),
    alone("data_parallel_master_port", 65535, data_parallel_master_port=65536),
    alone("data_parallel_rpc_port", 0, data_parallel_rpc_port=-1),
    alone("data_parallel_rpc_port", 0, data_parallel_rpc_port=29500, data_parallel_master_port=29500),
    alone("data_parallel_backend", "mp", data_parallel_backend="ray"),
    alone("distributed_executor_backend", "mp", distributed_executor_backend="ray"),
    alone("distributed_executor_backend", "external_launcher", distributed_executor_backend=dict),
    alone("distributed_executor_backend", "mp", data_parallel_size=2, distributed_executor_backend="uni"),
    alone("all2all_backend", "all_to_all", **EP, data_parallel_size=2, all2all_backend="pplx"),
    alone("all2all_backend", "allgather_reducescatter", data_parallel_size=2, all2all_backend="all_to_all"),
    alone("all2all_backend", "allgather_reducescatter", **EP, pipeline_parallel_size=2, all2all_backend="all_to_all"),
    alone("max_parallel_loading_workers", 1, max_parallel_loading_workers=0),
    alone("worker_cls", "auto", worker_cls="Worker"),
    alone("worker_extension_cls", "", worker_extension_cls="my-module.Extension"),
    alone("distributed_timeout", 86400, distributed_timeout=float("inf")),
    alone("enable_eplb", False, enable_eplb=True),
    alone("enable_eplb", True, **EP, enable_eplb=1),
    alone("num_redundant_experts", 0, num_redundant_experts=4),
    alone("num_redundant_experts", 0, **EPLB, num_redundant_experts=-1),
    alone("num_redundant_experts", 0, **EP, num_redundant_experts=4),
    alone("init_placement", None, **EP, init_placement="placement.npz"),
    alone("record_path", None, **EP, record_path="load.npz"),
    alone("record_path", "string", **EPLB, record_path=7),
    alone("window_size", 1, **EPLB, window_size=0),
    alone("step_interval", 1, **EPLB, step_interval=2.5),
    alone("load_interval", 1, **EPLB, load_interval=0),
    alone("log_balancedness", True, **EPLB, log_balancedness="yes"),
    alone("policy", "hierarchical", **EPLB, policy="default"),
    alone("bytes_per_step", 1024, **EPLB, bytes_per_step=0),
    alone("max_moved", 1, **EPLB, max_moved=0.0),
    alone("max_moved", 1, **EPLB, max_moved=float("nan")),
    alone("min_gain", 0, **EPLB, min_gain=-0.1),
    alone("kv_cache_dtype", "bfloat16", kv_cache_dtype="fp8"),
    alone("kv_cache_dtype", "float32", kv_cache_dtype="float16"),
    alone("dtype", "bfloat16", dtype="half"),
    alone("dtype", "auto", dtype="int8"),
    alone("block_size", 1, block_size=0),
    alone("gpu_memory_utilization", 1, gpu_memory_utilization=90),
    alone("max_num_batched_tokens", 64, max_num_seqs=64, max_num_batched_tokens=32),
    alone(
        "max_num_batched_tokens",
        128,
        max_model_len=128,
        enable_chunked_prefill=False,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    ),
    alone("step_deadline_s", 86400, step_deadline_s=1e9),
    with_model("tensor_parallel_size", 4, tensor_parallel_size=3),
    with_model("tensor_parallel_size", 4, tensor_parallel_size=8),
    with_model("tensor_parallel_size", 3, SIX_HEADS, tensor_parallel_size=2, **EP),
    with_model("tensor_parallel_size", 4, TEN_HEADS, tensor_parallel_size=5, enable_dp_attention=True),
    with_model("pipeline_parallel_size", 4, pipeline_parallel_size=5),
    with_model("pipeline_partition", [2, 3, 2], SEVEN_LAYERS, pipeline_parallel_size=3, pipeline_partition=(2, 2, 2)),
    with_model("data_parallel_size", 16, data_parallel_size=17, **EP),
    with_model("data_parallel_size", 8, data_parallel_size=16, tensor_parallel_size=2, enable_expert_parallel=True),
    with_model(
        "tensor_parallel_size", 1, {"num_experts": 4, **TEN_HEADS}, tensor_parallel_size=10, enable_expert_parallel=True
    ),
    with_model("data_parallel_size", 4, data_parallel_size=3),
    with_model("tensor_parallel_size", 2, {"moe_intermediate_size": 66, **TEN_HEADS}, tensor_parallel_size=10),
    with_model("tensor_parallel_size", 2, DENSE | {"intermediate_size": 258}, tensor_parallel_size=4),
    with_model("enable_expert_parallel", False, DENSE, data_parallel_size=2, **EP),
    with_model("num_redundant_experts", 16, **EPLB, data_parallel_size=2, num_redundant_experts=17),
    with_model("num_redundant_experts", 0, **EPLB, num_redundant_experts=1),
    with_model("num_redundant_experts", 4, **EPLB, data_parallel_size=4, num_redundant_experts=3, policy="global"),
    with_model("max_model_len", 1024, max_model_len=1025),
    with_model("data_parallel_master_port", 65534, DENSE, data_parallel_size=2, data_parallel_master_port=65535),
    with_model(
        "data_parallel_rpc_port",
        0,
        DENSE,
        data_parallel_size=2,
        data_parallel_master_port=29500,
        data_parallel_rpc_port=29501,
    ),
    with_model("max_num_batched_tokens", 1024, enable_chunked_prefill=False, max_num_batched_tokens=512),
]


def configure(settings: dict[str, Any], model: str = "demo") -> EngineConfig:
    """An EngineConfig from flat settings."""
    parts: dict[type, dict[str, Any]] = {cls: {} for cls in _NAMES}
    own: dict[str, Any] = {}
    for name, value in settings.items():
        (parts[_PARTS[name]] if name in _PARTS else own)[name] = value
    if eplb := parts.pop(EPLBConfig):
        parts[ParallelConfig]["eplb_config"] = EPLBConfig(**eplb)
    return EngineConfig(model, **own, **{_NAMES[cls]: cls(**values) for cls, values in parts.items()})


def shown(case: Case) -> str:
    return f"{case.field}={case.settings[case.field]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, in a folder whose config.json may be changed."""
    copy = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(model_folder("demo"), copy)
    return copy


@pytest.mark.parametrize("case", [c for c in CASES if c.model is None], ids=shown)
def test_what_cannot_work_is_refused_before_a_model_is_looked_at(case: Case) -> None:
    with pytest.raises(InvalidConfig) as caught:
        configure(case.settings)
    names_field_and_repair(caught.value, case)
    configure(case.settings | {case.field: case.repair})


@pytest.mark.parametrize("case", [c for c in CASES if c.model is not None], ids=shown)
def test_what_the_model_cannot_have_is_refused_before_a_process_starts(case: Case, folder: Path) -> None:
    values = json.loads((model_folder("demo") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | (case.model or {})))
    config = configure(case.settings, str(folder))
    with pytest.raises(InvalidConfig) as caught:
        resolve(config)
    names_field_and_repair(caught.value, case)
    resolve(configure(case.settings | {case.field: case.repair}, str(folder)))


def names_field_and_repair(error: InvalidConfig, case: Case) -> None:
    assert error.info.field == case.field
    assert case.field in error.text
    assert error.info.found
    assert str(case.repair) in error.info.valid


SPECS = {
    "few channels": replace(known_spec("llama-3-8b"), num_heads=12, num_kv_heads=4, intermediate_size=90),
    "odd channels": known_spec("qwen2.5-7b"),
    "few experts": known_spec("mixtral-8x7b"),
    "narrow experts": known_spec("qwen3-30b-a3b"),
    "latent": known_spec("deepseek-v2-lite"),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_size_that_a_message_offers_is_one_that_the_model_can_have(name: str) -> None:
    refused = 0
    for tp, dp, ep, attention in product((2, 3, 5, 6, 7, 8, 12, 24, 64), (1, 3, 8), (False, True), (False, True)):
        sizes = ParallelConfig(
            tensor_parallel_size=tp, data_parallel_size=dp, enable_expert_parallel=ep, enable_dp_attention=attention
        )
        error = refusal(sizes, SPECS[name])
        if error is None or error.field == "enable_expert_parallel":
            continue
        refused += 1
        offered = re.match(r"one of ([0-9, ]+)|1 to ([0-9]+)|([0-9]+)", error.info.valid)
        assert offered, error
        for size in re.findall("[0-9]+", offered[0]):
            again = refusal(replace(sizes, **{error.field: int(size)}), SPECS[name])
            assert again is None or again.field != error.field, f"{error}; but then {again}"
    assert refused > 5


def refusal(sizes: ParallelConfig, spec: ModelSpec) -> InvalidConfig | None:
    try:
        parallel_layout(sizes, spec)
    except InvalidConfig as error:
        return error
    return None


def test_there_are_forty_cases_at_least_and_no_two_alike() -> None:
    assert len(CASES) >= 40
    assert len({(shown(case), str(case.settings), str(case.model)) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_a_field_of_vllms_that_is_not_there_yet_is_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {name: True}
    with pytest.raises(InvalidConfig, match=f"{name}.*not in this version") as caught:
        ParallelConfig(**settings)
    assert caught.value.info.field == name
    assert NOT_YET[name] in caught.value.info.valid


@pytest.mark.parametrize("name", sorted(ParallelConfig.elsewhere))
def test_a_field_that_stands_in_the_config_of_eplb_is_said_to(name: str) -> None:
    settings: dict[str, Any] = {name: 4}
    with pytest.raises(InvalidConfig, match=r"eplb_config=EPLBConfig\(") as caught:
        ParallelConfig(**settings)
    assert caught.value.info.field == name
    field = name.removeprefix("eplb_")
    assert f"({field}=" in caught.value.info.valid
    assert field in EPLBConfig.__struct_fields__


@pytest.mark.parametrize("name", sorted(EPLBConfig.not_yet))
def test_a_field_of_vllms_eplb_config_is_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {name: True}
    with pytest.raises(InvalidConfig, match=f"{name}.*not in this version"):
        EPLBConfig(**settings)


@pytest.mark.parametrize(
    ("cls", "name", "near"),
    [
        (ParallelConfig, "tensor_paralel_size", "tensor_parallel_size"),
        (ParallelConfig, "data_parallel_sizes", "data_parallel_size"),
        (CacheConfig, "blocksize", "block_size"),
        (SchedulerConfig, "max_seqs", "max_num_seqs"),
        (EPLBConfig, "windowsize", "window_size"),
        (FaultConfig, "q", "step_deadline_s"),
        (EngineConfig, "max_model_length", "max_model_len"),
    ],
)
def test_a_name_that_no_setting_has_is_refused_with_the_nearest_ones(cls: type, name: str, near: str) -> None:
    with pytest.raises(InvalidConfig, match=f"there is no {name}") as caught:
        cls(**{name: 1})
    assert (caught.value.info.field, caught.value.info.found) == (name, "1")
    assert near in caught.value.info.valid


def test_no_field_is_both_there_and_refused() -> None:
    assert not set(NOT_YET) & set(ParallelConfig.__struct_fields__)
