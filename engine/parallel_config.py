"""How an engine is spread over ranks, and how those ranks are started. Names and defaults are vLLM's."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from drumline.engine.eplb_config import EPLBConfig
from drumline.engine.settings import (
    Settings,
    check_boolean,
    check_number,
    check_one_of,
    check_struct,
    check_text,
    check_whole,
    check_whole_or_none,
)
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import PLACEMENT_STRATEGIES

EXECUTOR_BACKENDS = ("uni", "mp", "external_launcher")
ALL2ALL_BACKENDS = ("allgather_reducescatter", "all_to_all")
DEFAULT_DISTRIBUTED_TIMEOUT_S = 120.0
MAX_RANKS = 16384
_MAX_PORT = 65535
_MAX_SIZE = 4096

_RAY = "it arrives with Ray, and until then mp and external_launcher start the ranks"
_ONE_MACHINE = "it arrives with ranks on several machines"
_LB = "it arrives with the HTTP server; one engine routes requests over all of its replicas"
_CONTEXT = "it arrives with context parallelism; tensor_parallel_size shards attention by heads"
NOT_YET: Mapping[str, str] = {
    "data_parallel_external_lb": _LB,
    "data_parallel_hybrid_lb": _LB,
    "data_parallel_start_rank": "data_parallel_rank says which replica is the first that is started here",
    "data_parallel_address": "data_parallel_master_ip is the address of the stores and the worker socket",
    "disable_custom_all_reduce": "it arrives with a custom all-reduce; NCCL and gloo reduce now",
    "enable_multimodal_encoder_data_parallel": "it arrives with models that see",
    "sd_worker_cls": "it arrives with speculative decoding; worker_cls names the class of every rank",
    "placement_group": _RAY,
    "ray_runtime_env": _RAY,
    "ray_workers_use_nsight": _RAY,
    "decode_context_parallel_size": _CONTEXT,
    "prefill_context_parallel_size": _CONTEXT,
    "enable_dbo": "it arrives with overlapped micro-batches",
    "nnodes": _ONE_MACHINE,
    "node_rank": _ONE_MACHINE,
    "master_addr": _ONE_MACHINE,
    "master_port": _ONE_MACHINE,
}
"""Fields of vLLM's that are refused by name, and what there is instead."""
_ELSEWHERE: Mapping[str, str] = {
    "num_redundant_experts": "eplb_config=EPLBConfig(num_redundant_experts=...)",
    "eplb_window_size": "eplb_config=EPLBConfig(window_size=...)",
    "eplb_step_interval": "eplb_config=EPLBConfig(step_interval=...)",
    "eplb_log_balancedness": "eplb_config=EPLBConfig(log_balancedness=...)",
}
_NO_RAY = {"ray": "Ray is not in this version"}
_FOREIGN_ALL2ALL = dict.fromkeys(
    (
        "naive",
        "pplx",
        "deepep_high_throughput",
        "deepep_low_latency",
        "mori",
        "flashinfer_all2allv",
    ),
    "not in this version",
)
_CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


class ParallelConfig(Settings, frozen=True):
    """How many ranks, what each holds, and who starts them.

    ``data_parallel_size`` engine replicas run side by side, each of ``tensor_parallel_size`` ranks that share every
    layer in each of ``pipeline_parallel_size`` stages. ``pipeline_partition``: layers of each stage, None for an even
    split. With ``enable_expert_parallel`` the experts of each MoE layer are split over the dp * tp ranks of its stage
    by ``expert_placement_strategy`` (linear: contiguous; round_robin), else each expert is sharded over them. With
    ``enable_eplb`` they move between ranks as their load changes, as ``eplb_config`` says.
    ``enable_dp_attention``: when tp exceeds the KV heads, an engine replica has max(tp // KV heads, 1) KV caches with
    rows of their own instead of copies of one. ``all2all_backend``: how tokens reach the ranks of their experts.

    ``distributed_executor_backend`` says who starts the ranks: uni (one rank, one process), mp (a forkserver; None is
    mp), external_launcher (a job script; none is started here). ``data_parallel_size_local`` replicas, from
    ``data_parallel_rank`` on, are started here, the others as with external_launcher; None starts all. The first rank
    started here takes device number ``data_parallel_rank_local * world_size``; None is 0.

    The epochs' stores listen on ``data_parallel_master_ip``, loopback as long as there are no keys, at
    ``data_parallel_master_port`` plus the number of the lockstep group (0: any free port), and ranks connect to
    ``data_parallel_rpc_port`` there (0: a socket in the engine's private folder). ``max_parallel_loading_workers``: how
    many ranks load weights at once. ``worker_cls`` and ``worker_extension_cls``: module.Class, imported by the ranks.
    ``distributed_timeout``: deadline of one collective in seconds, None is 120.
    """

    not_yet: ClassVar[Mapping[str, str]] = NOT_YET
    elsewhere: ClassVar[Mapping[str, str]] = _ELSEWHERE

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement_strategy: str = "linear"
    enable_dp_attention: bool = False
    pipeline_partition: tuple[int, ...] | None = None
    data_parallel_size_local: int | None = None
    data_parallel_rank: int = 0
    data_parallel_rank_local: int | None = None
    data_parallel_master_ip: str = "127.0.0.1"
    data_parallel_master_port: int = 0
    data_parallel_rpc_port: int = 0
    data_parallel_backend: str = "mp"
    distributed_executor_backend: str | None = None
    all2all_backend: str = "allgather_reducescatter"
    max_parallel_loading_workers: int | None = None
    worker_cls: str = "auto"
    worker_extension_cls: str = ""
    distributed_timeout: float | None = None
    enable_eplb: bool = False
    eplb_config: EPLBConfig = EPLBConfig()

    def __post_init__(self) -> None:
        for field in ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"):
            check_whole(field, getattr(self, field), 1, _MAX_SIZE)
        for field, times in (
            ("tensor_parallel_size", self.pipeline_parallel_size),
            ("data_parallel_size", self.world_size),
        ):
            if getattr(self, field) * times > MAX_RANKS:
                valid = f"at most {MAX_RANKS // times}: an engine has at most {MAX_RANKS} ranks"
                raise InvalidConfig(field, getattr(self, field), valid)
        self._check_partition()
        self._check_experts()
        self._check_eplb()
        check_boolean("enable_dp_attention", self.enable_dp_attention)
        check_one_of("data_parallel_backend", self.data_parallel_backend, ("mp",), _NO_RAY)
        self._check_backend()
        self._check_local_replicas()
        self._check_addresses()
        check_whole_or_none("max_parallel_loading_workers", self.max_parallel_loading_workers, 1)
        self._check_classes()
        if self.distributed_timeout is not None:
            check_number("distributed_timeout", self.distributed_timeout, 0.0, 86400.0)

    @property
    def world_size(self) -> int:
        """Ranks of one engine replica: tp * pp."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def world_size_across_dp(self) -> int:
        """Ranks of the whole engine: tp * pp * dp."""
        return self.world_size * self.data_parallel_size

    @property
    def executor_backend(self) -> str:
        """Who starts the ranks: ``distributed_executor_backend``, mp where it is None."""
        return self.distributed_executor_backend or "mp"

    @property
    def local_ranks(self) -> range:
        """The global ranks that this engine starts itself; the others are started by a job script."""
        if self.executor_backend == "external_launcher":
            return range(0)
        local = self.data_parallel_size if self.data_parallel_size_local is None else self.data_parallel_size_local
        first = self.data_parallel_rank * self.world_size
        return range(first, first + local * self.world_size)

    @property
    def external_ranks(self) -> tuple[int, ...]:
        """The global ranks that somebody else starts, ascending."""
        local = self.local_ranks
        return tuple(rank for rank in range(self.world_size_across_dp) if rank not in local)

    def compute_hash(self) -> str:
        """64 hex digits over all that shapes the computation: sizes, the placement of layers and experts and how many
        copies there are of these, attention replicas, the way to the experts, the classes that compute. Who starts a
        rank, where it listens and how long it waits are not in it."""
        shaping = {name: getattr(self, name) for name in _SHAPING}
        shaping["num_redundant_experts"] = self.eplb_config.num_redundant_experts
        return hashlib.sha256(msgspec.json.encode(shaping, order="deterministic")).hexdigest()

    # --------------------------------------------------------------------------------------------------------- checks

    def _check_partition(self) -> None:
        stages = self.pipeline_parallel_size
        given: object = self.pipeline_partition
        if given is None:
            return
        valid = f"None, or {stages} number{'s' if stages > 1 else ''} of layers from 1, one for each pipeline stage"
        if not isinstance(given, list | tuple) or not all(type(size) is int and size >= 1 for size in given):
            raise InvalidConfig("pipeline_partition", given, valid)
        if len(given) != stages:
            raise InvalidConfig("pipeline_partition", list(given), valid)
        msgspec.structs.force_setattr(self, "pipeline_partition", tuple(given))

    def _check_experts(self) -> None:
        check_boolean("enable_expert_parallel", self.enable_expert_parallel)
        check_one_of("expert_placement_strategy", self.expert_placement_strategy, PLACEMENT_STRATEGIES)
        check_one_of("all2all_backend", self.all2all_backend, ALL2ALL_BACKENDS, _FOREIGN_ALL2ALL)
        if self.enable_expert_parallel:
            spread = self.data_parallel_size * self.tensor_parallel_size > 1
            if self.all2all_backend != ALL2ALL_BACKENDS[0] and not spread:
                valid = f"{ALL2ALL_BACKENDS[0]} while one rank of a stage holds all experts (dp * tp is 1)"
                raise InvalidConfig("all2all_backend", self.all2all_backend, valid)
            return
        for field, only in (("expert_placement_strategy", "linear"), ("all2all_backend", ALL2ALL_BACKENDS[0])):
            if getattr(self, field) != only:
                valid = f"{only} while enable_expert_parallel is False: no rank holds whole experts of its own"
                raise InvalidConfig(field, getattr(self, field), valid)

    def _check_eplb(self) -> None:
        check_boolean("enable_eplb", self.enable_eplb)
        check_struct("eplb_config", self.eplb_config, EPLBConfig)
        if self.enable_eplb:
            if not self.enable_expert_parallel:
                valid = "False while enable_expert_parallel is False: no rank holds whole experts that could move"
                raise InvalidConfig("enable_eplb", self.enable_eplb, valid)
            return
        for field, nothing in (("num_redundant_experts", 0), ("init_placement", None), ("record_path", None)):
            value = getattr(self.eplb_config, field)
            if value != nothing:
                valid = f"{nothing} while enable_eplb is False: experts stay where they are placed at the start"
                raise InvalidConfig(field, value, valid)

    def _check_backend(self) -> None:
        backend = self.distributed_executor_backend
        if backend is not None:
            check_one_of("distributed_executor_backend", backend, EXECUTOR_BACKENDS, _NO_RAY)
        if backend == "uni" and self.world_size_across_dp > 1:
            valid = f"mp or external_launcher: uni runs one rank, and these sizes make {self.world_size_across_dp}"
            raise InvalidConfig("distributed_executor_backend", backend, valid)

    def _check_local_replicas(self) -> None:
        size = self.data_parallel_size
        check_whole_or_none("data_parallel_size_local", self.data_parallel_size_local, 0, _MAX_SIZE)
        check_whole("data_parallel_rank", self.data_parallel_rank, 0, _MAX_SIZE - 1)
        check_whole_or_none("data_parallel_rank_local", self.data_parallel_rank_local, 0, _MAX_SIZE - 1)
        local = self.data_parallel_size_local
        if self.executor_backend == "external_launcher":
            for field, only in (
                ("data_parallel_size_local", None),
                ("data_parallel_rank", 0),
                ("data_parallel_rank_local", None),
            ):
                if getattr(self, field) != only:
                    raise InvalidConfig(field, getattr(self, field), f"{only}: external_launcher starts no rank here")
            return
        if local is not None and not 1 <= local <= size:
            valid = f"None, or 1 to {size} (data_parallel_size); to start none here: external_launcher"
            raise InvalidConfig("data_parallel_size_local", local, valid)
        last = size - (size if local is None else local)
        if self.data_parallel_rank > last:
            valid = f"0 to {last}: {size - last} of {size} replicas are started here, from this one on"
            raise InvalidConfig("data_parallel_rank", self.data_parallel_rank, valid)

    def _check_addresses(self) -> None:
        check_text("data_parallel_master_ip", self.data_parallel_master_ip)
        valid = "a loopback address such as 127.0.0.1: another one needs keys on both sides, and there are none yet"
        try:
            loopback = ipaddress.ip_address(self.data_parallel_master_ip).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise InvalidConfig("data_parallel_master_ip", self.data_parallel_master_ip, valid)
        for field in ("data_parallel_master_port", "data_parallel_rpc_port"):
            check_whole(field, getattr(self, field), 0, _MAX_PORT)
        if self.data_parallel_rpc_port and self.data_parallel_rpc_port == self.data_parallel_master_port:
            valid = f"0, or another port than data_parallel_master_port ({self.data_parallel_master_port})"
            raise InvalidConfig("data_parallel_rpc_port", self.data_parallel_rpc_port, valid)

    def _check_classes(self) -> None:
        for field, none in (("worker_cls", "auto"), ("worker_extension_cls", "")):
            value = getattr(self, field)
            if value != none and not (isinstance(value, str) and _CLASS_PATH.fullmatch(value)):
                raise InvalidConfig(field, value, f"{none!r}, or module.Class or module:Class")


_SHAPING = (
    "data_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "pipeline_partition",
    "enable_expert_parallel",
    "expert_placement_strategy",
    "enable_dp_attention",
    "all2all_backend",
    "worker_cls",
    "worker_extension_cls",
    "enable_eplb",
)
