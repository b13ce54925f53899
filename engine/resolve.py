"""From what a user decided and what the model folder says, to what coordinator and workers need.

Runs in the app before any process starts, so that a broken folder or an impossible layout is refused there with a
typed error, and again in the coordinator, which trusts nothing but its own reading. Reads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from drumline.engine.config import DTYPES, EngineConfig, check_chunked_prefill
from drumline.engine.core.config import CoreConfig
from drumline.engine.first_placement import first_placement
from drumline.engine.parallel_config import DEFAULT_DISTRIBUTED_TIMEOUT_S
from drumline.engine.parallel_layout import balances, layout_warnings, parallel_layout
from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.codec import config_digest
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32, ModelInfo, WorkerConfig
from drumline.protocol.modelspec import ModelSpec

MAX_TOKENIZER_BYTES = 48 << 20
DEMO = "demo"


class ResolvedConfig(msgspec.Struct, frozen=True):
    """An engine that can be started.

    ``groups``: the ranks of each lockstep group. ``placements``: by group, int32 (moe_layers, slots). ``digest``: of
    ``worker``, compared in every handshake. ``tokenizer``: the tokenizer.json to hand to clients, None for a model that
    is served by token ids only. ``warnings``: what a user should know but need not change.
    """

    config: EngineConfig
    spec: ModelSpec
    layout: Layout
    worker: WorkerConfig
    digest: str
    core: CoreConfig
    groups: tuple[tuple[int, ...], ...]
    placements: Mapping[int, I32]
    tokenizer: Path | None
    warnings: tuple[str, ...] = ()

    def in_folder(self, runtime_dir: str) -> ResolvedConfig:
        """The same engine, whose ranks find what they share on their host in ``runtime_dir``."""
        worker = msgspec.structs.replace(self.worker, runtime_dir=runtime_dir)
        return msgspec.structs.replace(self, worker=worker, digest=config_digest(worker))

    def model_info(self, blocks_per_replica: int) -> ModelInfo:
        """What clients are told. ``blocks_per_replica``: KV blocks of the smallest replica."""
        room = min(self.core.max_model_len, blocks_per_replica * self.core.block_size)
        return ModelInfo(
            model=self.config.model,
            served_model_name=self.config.served_model_name or self.config.model,
            vocab_size=self.spec.vocab_size,
            max_model_len=self.core.max_model_len,
            eos_token_ids=self.spec.eos_token_ids,
            data_parallel_size=self.core.data_parallel_size,
            # One place is left for the token that is generated.
            max_prompt_tokens=max(room - 1, 0),
            has_tokenizer=self.tokenizer is not None,
            block_size=self.core.block_size,
        )

    def read_tokenizer(self) -> bytes:
        """The bytes of tokenizer.json, empty without one. Raises InvalidConfig when it cannot be read."""
        if self.tokenizer is None:
            return b""
        try:
            return self.tokenizer.read_bytes()
        except OSError as error:
            raise InvalidConfig("tokenizer", f"{self.tokenizer}: {error}", "a readable tokenizer.json") from error


def model_folder(model: str) -> Path:
    """The folder of ``model``: "demo" is the one in the package."""
    if model == DEMO:
        return Path(__file__).parent / DEMO
    return Path(model).expanduser()


def resolve(config: EngineConfig) -> ResolvedConfig:
    """Read the model folder and check ``config`` against it.

    Raises InvalidConfig (field, found, valid) for a folder that is missing or broken, an architecture that is not
    supported, a checkpoint that is cut short, and a layout or bounds that this model cannot have.
    """
    folder = model_folder(config.model)
    spec = ModelSpec.from_folder(folder)
    CheckpointIndex.open(folder)
    parallel = config.parallel
    layout = parallel_layout(parallel, spec)
    max_model_len = longest_context(config, spec)
    check_chunked_prefill(config.scheduler, max_model_len)
    groups = tuple(
        tuple(rank for dp_rank in replicas for rank in layout.replica_ranks(dp_rank))
        for replicas in layout.lockstep_groups(spec.is_moe)
    )
    worker = _worker_config(config, folder, max_model_len, layout, compute_dtype(config, spec))
    placements: dict[int, I32] = {}
    if spec.is_moe:
        placements = dict.fromkeys(range(len(groups)), first_placement(parallel, spec, layout))
    _check_record(parallel.eplb_config.record_path)
    return ResolvedConfig(
        config=config,
        spec=spec,
        layout=layout,
        worker=worker,
        digest=config_digest(worker),
        core=_core_config(config, spec, layout, max_model_len),
        groups=groups,
        placements=placements,
        tokenizer=_tokenizer(config, folder),
        warnings=(*_dtype_warnings(config, spec), *layout_warnings(parallel, layout, spec)),
    )


def _check_record(path: str | None) -> None:
    if path is not None:
        file = Path(path).expanduser()
        if file.is_dir() or not file.parent.is_dir():
            raise InvalidConfig("record_path", path, "a file, in a folder that exists")


def longest_context(config: EngineConfig, spec: ModelSpec) -> int:
    """``max_model_len`` in tokens, the model's own where None was given. Raises InvalidConfig for more than that."""
    if config.max_model_len is None:
        return spec.max_position_embeddings
    if config.max_model_len > spec.max_position_embeddings:
        raise InvalidConfig(
            "max_model_len",
            config.max_model_len,
            f"at most {spec.max_position_embeddings}, the positions that the model was made for",
        )
    return config.max_model_len


def compute_dtype(config: EngineConfig, spec: ModelSpec) -> str:
    """The dtype of weights and activations: as asked for, or the checkpoint's where it is one to compute in."""
    if config.dtype != "auto":
        return config.dtype
    return spec.dtype if spec.dtype in DTYPES else "float32"


def _worker_config(config: EngineConfig, folder: Path, max_model_len: int, layout: Layout, dtype: str) -> WorkerConfig:
    cache, parallel = config.cache, config.parallel
    first = parallel.local_ranks.start if parallel.local_ranks else 0
    return WorkerConfig(
        model=str(folder.resolve()),
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=cache.block_size,
        num_blocks=cache.num_gpu_blocks_override or 0,
        kv_cache_memory_bytes=cache.kv_cache_memory_bytes or 0,
        gpu_memory_utilization=cache.gpu_memory_utilization,
        data_parallel_size=layout.data_parallel_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        enable_expert_parallel=layout.enable_expert_parallel,
        expert_placement_strategy=parallel.expert_placement_strategy,
        seed=config.seed,
        # Sockets are on loopback, so that ranks started elsewhere share this machine's cores and memory too.
        local_ranks=layout.num_ranks,
        fault_injection=config.fault_injection,
        # A coordinator in the app's own loop ends with the app: there is none to wait for.
        coordinator_lease_s=0.0 if config.inline else config.faults.coordinator_lease_s,
        attention_data_parallel_size=layout.attention_data_parallel_size,
        pipeline_partition=layout.pipeline_partition,
        all2all_backend=parallel.all2all_backend,
        kv_cache_dtype=cache.kv_cache_dtype,
        worker_cls=parallel.worker_cls,
        worker_extension_cls=parallel.worker_extension_cls,
        distributed_timeout_s=float(parallel.distributed_timeout or DEFAULT_DISTRIBUTED_TIMEOUT_S),
        max_parallel_loading_workers=parallel.max_parallel_loading_workers or 0,
        first_local_rank=first,
        first_local_device=(parallel.data_parallel_rank_local or 0) * layout.world_size,
        enable_eplb=balances(parallel, layout),
        load_interval=parallel.eplb_config.load_interval if balances(parallel, layout) else 0,
    )


def _core_config(config: EngineConfig, spec: ModelSpec, layout: Layout, max_model_len: int) -> CoreConfig:
    scheduler = config.scheduler
    return CoreConfig(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        data_parallel_size=layout.data_parallel_size,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        attention_data_parallel_size=layout.attention_data_parallel_size,
        attention_tensor_parallel_size=layout.attn_tp_size,
        lockstep=spec.is_moe,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        enable_chunked_prefill=scheduler.enable_chunked_prefill,
        async_scheduling=scheduler.async_scheduling,
        max_waiting=scheduler.max_waiting,
        resume_window_s=config.faults.resume_window_s,
    )


def _tokenizer(config: EngineConfig, folder: Path) -> Path | None:
    """The tokenizer.json to serve; only one that was asked for must be there."""
    if config.tokenizer is None:
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
    else:
        path = Path(config.tokenizer).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
    valid = f"a tokenizer.json of at most {MAX_TOKENIZER_BYTES} bytes, or a folder that holds one"
    try:
        if path.exists() and not path.is_file():
            raise InvalidConfig("tokenizer", f"{path}, no regular file", valid)
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise InvalidConfig("tokenizer", f"{path} of {size} bytes", valid)
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidConfig("tokenizer", f"{path}: {error.strerror}", valid) from error
    except (ValueError, RecursionError) as error:
        raise InvalidConfig("tokenizer", f"{path}: not JSON ({error})", valid) from error
    if not isinstance(parsed, dict) or "model" not in parsed:
        raise InvalidConfig("tokenizer", f"{path}: JSON without a model", valid)
    return path.resolve()


def _dtype_warnings(config: EngineConfig, spec: ModelSpec) -> tuple[str, ...]:
    dtype = compute_dtype(config, spec)
    if config.dtype == "auto" and dtype != spec.dtype:
        return (f"the checkpoint is {spec.dtype}; it is computed in {dtype}",)
    return ()
