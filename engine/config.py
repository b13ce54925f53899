"""What a user decides about an engine. Every struct checks itself when it is made and raises InvalidConfig.

Here only what the configuration alone can tell is checked; what depends on the model folder is checked by
:func:`drumline.engine.resolve.resolve`, still before any process starts. Names and defaults are vLLM's. A setting
arrives with the work behind it: what is not there yet is refused by name, never ignored.
"""

from __future__ import annotations

import os

import msgspec

from drumline.protocol.errors import InvalidConfig

PLACEMENT_STRATEGIES = ("linear", "round_robin")
DTYPES = ("auto", "float32")
MAX_SEED = (1 << 63) - 1
_LARGEST = (1 << 31) - 1
_LARGEST_BYTES = 1 << 50


def _whole(field: str, value: object, minimum: int, maximum: int = _LARGEST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise InvalidConfig(field, value, f"a whole number, {minimum} to {maximum}")


def _whole_or_none(field: str, value: object, minimum: int, maximum: int = _LARGEST) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum):
        raise InvalidConfig(field, value, f"None, or a whole number, {minimum} to {maximum}")


def _number(field: str, value: object, above: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= maximum:
        raise InvalidConfig(field, value, f"a number above {above:g}, at most {maximum:g}")


def _boolean(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidConfig(field, value, "True or False")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidConfig(field, value, "a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        # A path of bytes that are no UTF-8, too: every process is told it as JSON.
        raise InvalidConfig(field, ascii(value), "text that is Unicode") from None


def _one_of(field: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise InvalidConfig(field, value, "one of " + ", ".join(valid))


def _struct(field: str, value: object, cls: type) -> None:
    if not isinstance(value, cls):
        raise InvalidConfig(field, value, f"a {cls.__name__}")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the settings."""


class ParallelConfig(Settings, frozen=True):
    """How many ranks, and what each holds.

    ``data_parallel_size`` engine replicas run side by side. With ``enable_expert_parallel`` the experts of each MoE
    layer are split over all of them by ``expert_placement_strategy`` (linear: contiguous; round_robin); a MoE model
    over several replicas needs it. Tensor and pipeline parallelism are refused until they exist.
    """

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement_strategy: str = "linear"
    worker_cls: str = "auto"
    worker_extension_cls: str = ""

    def __post_init__(self) -> None:
        _whole("data_parallel_size", self.data_parallel_size, 1, 4096)
        _whole("tensor_parallel_size", self.tensor_parallel_size, 1, 4096)
        _whole("pipeline_parallel_size", self.pipeline_parallel_size, 1, 4096)
        for field in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(self, field)
            if size > 1:
                raise InvalidConfig(field, size, "1: this version splits work by data and expert parallelism only")
        _boolean("enable_expert_parallel", self.enable_expert_parallel)
        _one_of("expert_placement_strategy", self.expert_placement_strategy, PLACEMENT_STRATEGIES)


class CacheConfig(Settings, frozen=True):
    """The KV cache of each rank, in blocks of ``block_size`` tokens.

    Its size is ``num_gpu_blocks_override`` blocks, else ``kv_cache_memory_bytes``, else on CUDA what
    ``gpu_memory_utilization`` leaves, and on CPU what max_num_seqs sequences of max_model_len need, at most 1 GiB and
    a quarter of the free memory per local rank.
    """

    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        _whole("block_size", self.block_size, 1, 4096)
        _number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0)
        _whole_or_none("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, _LARGEST_BYTES)
        _whole_or_none("num_gpu_blocks_override", self.num_gpu_blocks_override, 1)
        _boolean("enable_prefix_caching", self.enable_prefix_caching)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto",))


class SchedulerConfig(Settings, frozen=True):
    """Bounds per replica: rows that run together, tokens per step, and sequences that may wait in the whole engine."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    max_waiting: int = 16384

    def __post_init__(self) -> None:
        _whole("max_num_seqs", self.max_num_seqs, 1, 1 << 20)
        _whole("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _boolean("enable_chunked_prefill", self.enable_chunked_prefill)
        _boolean("async_scheduling", self.async_scheduling)
        _whole("max_waiting", self.max_waiting, 1)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise InvalidConfig(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs ({self.max_num_seqs}): every running row computes a token in a step",
            )


class FaultConfig(Settings, frozen=True):
    """When a rank counts as lost, in seconds.

    ``step_deadline_s``: None means max(2, 10 times what recent steps took for as many tokens). ``start_deadline_s``:
    longest time of a start in which a rank makes no progress (weights read, messages answered).
    """

    step_deadline_s: float | None = None
    start_deadline_s: float = 120.0

    def __post_init__(self) -> None:
        if self.step_deadline_s is not None:
            _number("step_deadline_s", self.step_deadline_s, 0.0, 86400.0)
        _number("start_deadline_s", self.start_deadline_s, 0.0, 86400.0)


class EngineConfig(Settings, frozen=True):
    """One engine. ``model`` is a Hugging Face folder or "demo", the model that comes with the package.

    ``tokenizer``: a folder or a tokenizer.json, when it is not the model's own. ``max_model_len``: None takes the
    model's own. ``dtype``: "auto" computes in float32. ``journal``: None or "off". ``endpoint``: None, the sockets lie
    in a private folder of the engine. ``inline`` runs the coordinator in the app's event loop, not in a process of its
    own. ``fault_injection``: False.
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
        _text("model", self.model)
        for field in ("tokenizer", "served_model_name"):
            if getattr(self, field) is not None:
                _text(field, getattr(self, field))
        _one_of("dtype", self.dtype, DTYPES)
        _whole_or_none("max_model_len", self.max_model_len, 1)
        _whole("seed", self.seed, 0, MAX_SEED)
        _struct("parallel", self.parallel, ParallelConfig)
        _struct("cache", self.cache, CacheConfig)
        _struct("scheduler", self.scheduler, SchedulerConfig)
        _struct("faults", self.faults, FaultConfig)
        if self.journal is not None and self.journal != "off":
            raise InvalidConfig("journal", self.journal, "None or 'off': this version keeps no journal")
        if self.endpoint is not None:
            raise InvalidConfig("endpoint", self.endpoint, "None: this version serves only the app that started it")
        _boolean("inline", self.inline)
        if self.fault_injection is not False:
            raise InvalidConfig("fault_injection", self.fault_injection, "False: this version injects no faults")
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
