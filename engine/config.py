"""What a user decides about an engine. Every struct checks itself when it is made and raises InvalidConfig.

Here only what the configuration alone can tell is checked; what depends on the model folder is checked by
:func:`drumline.engine.resolve.resolve`, still before any process starts. Names and defaults are vLLM's. A setting
arrives with the work behind it: what is not there yet is refused by name, never ignored.
"""

from __future__ import annotations

import os

import msgspec

from drumline.engine.eplb_config import EPLBConfig
from drumline.engine.parallel_config import ALL2ALL_BACKENDS, EXECUTOR_BACKENDS, ParallelConfig
from drumline.engine.settings import (
    LARGEST_BYTES,
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

__all__ = [
    "ALL2ALL_BACKENDS",
    "DTYPES",
    "EXECUTOR_BACKENDS",
    "MAX_SEED",
    "PLACEMENT_STRATEGIES",
    "CacheConfig",
    "EPLBConfig",
    "EngineConfig",
    "FaultConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "check_chunked_prefill",
]

DTYPES = ("auto", "float32", "bfloat16")
MAX_SEED = (1 << 63) - 1
_HALF = "it overflows at 65,504; use bfloat16, of the same size, or float32"
_OTHER_DTYPES = {"float16": _HALF, "half": _HALF, "float": "use float32"}
_QUANTISED = "a cache of fewer bits is not in this version"
_OTHER_CACHE_DTYPES = dict.fromkeys(
    ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "int8", "int4", "nvfp4"), _QUANTISED
) | {"float16": _HALF, "half": _HALF}


class CacheConfig(Settings, frozen=True):
    """The KV cache of each rank, in blocks of ``block_size`` tokens.

    Its size is ``num_gpu_blocks_override`` blocks, else ``kv_cache_memory_bytes``, else on CUDA what
    ``gpu_memory_utilization`` leaves, and on CPU what max_num_seqs sequences of max_model_len need, at most 1 GiB and
    a quarter of the free memory per local rank. ``kv_cache_dtype``: "auto" is the model's.
    """

    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_whole("block_size", self.block_size, 1, 4096)
        check_number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0)
        check_whole_or_none("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, LARGEST_BYTES)
        check_whole_or_none("num_gpu_blocks_override", self.num_gpu_blocks_override, 1)
        check_boolean("enable_prefix_caching", self.enable_prefix_caching)
        check_one_of("kv_cache_dtype", self.kv_cache_dtype, DTYPES, _OTHER_CACHE_DTYPES)


class SchedulerConfig(Settings, frozen=True):
    """Bounds per replica: rows that run together, tokens per step, and sequences that may wait in the whole engine."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    max_waiting: int = 16384

    def __post_init__(self) -> None:
        check_whole("max_num_seqs", self.max_num_seqs, 1, 1 << 20)
        check_whole("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_boolean("enable_chunked_prefill", self.enable_chunked_prefill)
        check_boolean("async_scheduling", self.async_scheduling)
        check_whole("max_waiting", self.max_waiting, 1)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise InvalidConfig(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs ({self.max_num_seqs}): every running row computes a token in a step",
            )


class FaultConfig(Settings, frozen=True):
    """When a rank counts as lost, and what is done about it. Times are in seconds.

    ``step_deadline_s``: None means max(2, 10 times what recent steps took for as many tokens); a rank may ask for more
    (its first steps). ``start_deadline_s``: longest time of a start in which a rank makes no progress (weights read,
    messages answered). ``coordinator_lease_s``: how long ranks keep their weights without a coordinator.
    ``restart_limit``: how often a rank is started again within 10 minutes. ``resume_window_s``: how long a request with
    a client-chosen id goes on without its client. ``expert_growth_bytes``: how much more memory a rank may take for
    experts of lost ranks; None: on CUDA 0, on CPU what one rank needs to hold all experts, within half the free memory.
    """

    step_deadline_s: float | None = None
    start_deadline_s: float = 120.0
    coordinator_lease_s: float = 60.0
    restart_limit: int = 5
    resume_window_s: float = 60.0
    expert_growth_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.step_deadline_s is not None:
            check_number("step_deadline_s", self.step_deadline_s, 0.0, 86400.0)
        check_number("start_deadline_s", self.start_deadline_s, 0.0, 86400.0)
        check_number("coordinator_lease_s", self.coordinator_lease_s, 0.0, 86400.0)
        check_whole("restart_limit", self.restart_limit, 0, 1000)
        check_number("resume_window_s", self.resume_window_s, 0.0, 86400.0)
        check_whole_or_none("expert_growth_bytes", self.expert_growth_bytes, 0, LARGEST_BYTES)


class EngineConfig(Settings, frozen=True):
    """One engine. ``model`` is a Hugging Face folder or "demo", the model that comes with the package.

    ``tokenizer``: a folder or a tokenizer.json, when it is not the model's own. ``max_model_len``: None takes the
    model's own. ``dtype``: "auto" is the checkpoint's, float32 for one in float16. ``journal``: None keeps
    it in the engine's private folder, "off" keeps none, else the path of the file. ``endpoint``: None, the sockets lie
    in a private folder of the engine. ``inline`` runs the coordinator in the app's event loop, not in a process of its
    own. ``fault_injection``: ranks obey injected faults, and are started again after 0.5 s at most
    (:mod:`drumline.engine.testing`).
    """

    model: str
    tokenizer: str | None = None
    served_model_name: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    seed: int = 0
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    faults: FaultConfig = FaultConfig()
    journal: str | None = None
    endpoint: str | None = None
    inline: bool = False
    fault_injection: bool = False

    def __post_init__(self) -> None:
        for field in ("model", "tokenizer"):
            value = getattr(self, field)
            if isinstance(value, os.PathLike):
                msgspec.structs.force_setattr(self, field, os.fsdecode(value))
        check_text("model", self.model)
        for field in ("tokenizer", "served_model_name"):
            if getattr(self, field) is not None:
                check_text(field, getattr(self, field))
        check_one_of("dtype", self.dtype, DTYPES, _OTHER_DTYPES)
        check_whole_or_none("max_model_len", self.max_model_len, 1)
        check_whole("seed", self.seed, 0, MAX_SEED)
        check_struct("parallel", self.parallel, ParallelConfig)
        check_struct("cache", self.cache, CacheConfig)
        check_struct("scheduler", self.scheduler, SchedulerConfig)
        check_struct("faults", self.faults, FaultConfig)
        if isinstance(self.journal, os.PathLike):
            msgspec.structs.force_setattr(self, "journal", os.fsdecode(self.journal))
        if self.journal is not None:
            check_text("journal", self.journal)
        if self.endpoint is not None:
            raise InvalidConfig("endpoint", self.endpoint, "None: this version serves only the app that started it")
        check_boolean("inline", self.inline)
        check_boolean("fault_injection", self.fault_injection)
        if self.max_model_len is not None:
            check_chunked_prefill(self.scheduler, self.max_model_len)


def check_chunked_prefill(scheduler: SchedulerConfig, max_model_len: int) -> None:
    """Without chunked prefill one step must hold the longest prompt: raises InvalidConfig when it cannot."""
    if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < max_model_len:
        raise InvalidConfig(
            "max_num_batched_tokens",
            scheduler.max_num_batched_tokens,
            f"at least max_model_len ({max_model_len}) while enable_chunked_prefill is False",
        )
