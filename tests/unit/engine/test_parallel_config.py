"""What the parallel settings come to: sizes, who starts which rank, and the hash of what shapes the computation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from drumline.engine.config import EPLBConfig, ParallelConfig

BASE = ParallelConfig(
    data_parallel_size=4,
    tensor_parallel_size=2,
    pipeline_parallel_size=2,
    enable_expert_parallel=True,
)
SHAPING: dict[str, Any] = {
    "data_parallel_size": 2,
    "tensor_parallel_size": 4,
    "pipeline_parallel_size": 3,
    "enable_expert_parallel": False,
    "expert_placement_strategy": "round_robin",
    "enable_dp_attention": True,
    "pipeline_partition": (3, 1),
    "all2all_backend": "all_to_all",
    "worker_cls": "mine.Worker",
    "worker_extension_cls": "mine.Extension",
    "enable_eplb": True,
}
NOT_SHAPING: dict[str, Any] = {
    "data_parallel_size_local": 2,
    "data_parallel_rank": 0,
    "data_parallel_rank_local": 1,
    "data_parallel_master_ip": "127.0.0.2",
    "data_parallel_master_port": 29500,
    "data_parallel_rpc_port": 29550,
    "data_parallel_backend": "mp",
    "distributed_executor_backend": "external_launcher",
    "max_parallel_loading_workers": 1,
    "distributed_timeout": 9.0,
    "eplb_config": EPLBConfig(window_size=10, policy="global", min_gain=0.5),
}


def changed(name: str, value: Any) -> ParallelConfig:
    return msgspec.structs.replace(BASE, **{name: value})


def test_every_field_is_said_to_shape_the_computation_or_not() -> None:
    assert set(SHAPING) | set(NOT_SHAPING) == set(ParallelConfig.__struct_fields__)


@pytest.mark.parametrize("name", sorted(SHAPING))
def test_what_shapes_the_computation_is_in_the_hash(name: str) -> None:
    assert changed(name, SHAPING[name]).compute_hash() != BASE.compute_hash()


@pytest.mark.parametrize("name", sorted(NOT_SHAPING))
def test_what_does_not_is_not_in_the_hash(name: str) -> None:
    assert changed(name, NOT_SHAPING[name]).compute_hash() == BASE.compute_hash()


def test_redundant_experts_shape_the_computation() -> None:
    balanced = changed("enable_eplb", True)
    more = msgspec.structs.replace(balanced, eplb_config=EPLBConfig(num_redundant_experts=4))
    assert more.compute_hash() != balanced.compute_hash()


def test_the_hash_is_a_function_of_the_settings_alone() -> None:
    assert len(BASE.compute_hash()) == 64
    again = msgspec.json.decode(msgspec.json.encode(BASE), type=ParallelConfig)
    assert again.compute_hash() == BASE.compute_hash()


def test_the_world_is_tp_times_pp_and_across_dp_times_dp() -> None:
    assert (BASE.world_size, BASE.world_size_across_dp) == (4, 16)
    assert ParallelConfig().world_size_across_dp == 1


@pytest.mark.parametrize(
    ("settings", "local", "external"),
    [
        ({}, range(16), ()),
        ({"distributed_executor_backend": "mp"}, range(16), ()),
        ({"data_parallel_size_local": 1}, range(4), tuple(range(4, 16))),
        ({"data_parallel_size_local": 2, "data_parallel_rank": 1}, range(4, 12), (0, 1, 2, 3, 12, 13, 14, 15)),
        ({"data_parallel_size_local": 4}, range(16), ()),
        ({"distributed_executor_backend": "external_launcher"}, range(0), tuple(range(16))),
    ],
)
def test_who_starts_which_rank(settings: dict[str, Any], local: range, external: tuple[int, ...]) -> None:
    parallel = msgspec.structs.replace(BASE, **settings)
    assert parallel.local_ranks == local
    assert parallel.external_ranks == external


def test_a_partition_may_be_a_list() -> None:
    given: Any = [2, 3, 2]
    assert ParallelConfig(pipeline_parallel_size=3, pipeline_partition=given).pipeline_partition == (2, 3, 2)


@pytest.mark.parametrize("path", ["a.B", "a:B", "pkg.mod.Class", "pkg.mod:Class", "_private.Worker2"])
def test_a_class_is_named_by_its_module(path: str) -> None:
    parallel = ParallelConfig(worker_cls=path, worker_extension_cls=path)
    assert (parallel.worker_cls, parallel.worker_extension_cls) == (path, path)


@pytest.mark.parametrize("backend", [None, "uni", "mp", "external_launcher"])
def test_one_rank_may_be_started_in_any_way(backend: str | None) -> None:
    assert ParallelConfig(distributed_executor_backend=backend).executor_backend == (backend or "mp")
