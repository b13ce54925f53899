"""The paged cache of keys and values of one rank, and how many blocks it gets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import WorkerConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import RankShards
from drumline.protocol.weights import kv_entries_per_token
from drumline.workers.loading import COMPUTE_DTYPES

CPU_DEFAULT_LIMIT = 1 << 30
_TOKEN_ID_BYTES = 4


class KVCache:
    """Keys and values of every layer of a stage in blocks of ``block_size`` tokens, with the token ids beside them.

    ``keys[i]`` and ``values[i]``, for the i-th layer of the stage, are (kv heads, blocks, block size, head dim); with
    latent attention there are no values (None), and the keys are (1, blocks, block size, kv_lora_rank +
    qk_rope_head_dim). ``tokens`` is int32 (blocks * block_size,), the id at each slot. They are written with the keys,
    so a block that is cached or shared brings its ids along, and whatever needs a row's history reads it through the
    row's block table.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shards: RankShards,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        heads, parts, width = _cache_shape(spec, shards)
        shape = (shards.num_layers, parts, heads, num_blocks, block_size, width)
        # Zeros, because a masked position still takes part in products, and 0 * NaN of stale memory would be NaN.
        whole = _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = [layer[0] for layer in whole]
        self.values: list[Tensor | None] = [layer[1] if parts == 2 else None for layer in whole]
        self.tokens = torch.zeros(num_blocks * block_size, dtype=torch.int32, device=device)
        self._scratch = torch.empty(parts, 0, block_size, width, dtype=dtype, device=device)

    @property
    def gather_bytes(self) -> int:
        """Bytes of the keys of one block in one layer."""
        return self.keys[0][:, 0].nbytes

    def scratch(self, num_blocks: int) -> Tensor:
        """Room to gather ``num_blocks`` blocks of keys and of values into, (2, kv heads * num_blocks, block, head dim);
        with latent attention (1, num_blocks, block, channels).

        The same memory every time: fresh pages for each gather would cost more than the gather.
        """
        kv_heads, _, block_size, head_dim = self.keys[0].shape
        needed = kv_heads * num_blocks
        if self._scratch.shape[1] < needed:
            larger = max(needed, 2 * self._scratch.shape[1])
            self._scratch = self._scratch.new_empty(len(self._scratch), larger, block_size, head_dim)
        return self._scratch[:, :needed]

    def scrub(self, blocks: Tensor) -> None:
        """Replace NaN and infinity in ``blocks`` (int64) by finite numbers.

        After a numeric fault: whoever gets these blocks next must not inherit it through masked positions.
        """
        for part in (*self.keys, *(values for values in self.values if values is not None)):
            part.index_copy_(1, blocks, part.index_select(1, blocks).nan_to_num_(0.0, 0.0, 0.0))


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory that the system hands out page by page as it is used: an idle cache costs no memory."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(math.prod(shape) * itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _cache_shape(spec: ModelSpec, shards: RankShards) -> tuple[int, int, int]:
    """Heads, parts (keys and values, or latents alone) and channels of the cache of one layer."""
    if spec.mla is not None:
        return 1, 1, spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    return shards.kv_heads[1] - shards.kv_heads[0], 2, spec.head_dim


def kv_dtype(requested: str, compute: torch.dtype) -> torch.dtype:
    """The dtype of the cache: ``auto`` is the one computed in. Raises InvalidConfig for one that is not supported."""
    if requested == "auto":
        return compute
    if requested not in COMPUTE_DTYPES:
        raise InvalidConfig("kv_cache_dtype", requested, "auto, " + ", ".join(COMPUTE_DTYPES))
    return COMPUTE_DTYPES[requested]


def block_bytes(spec: ModelSpec, shards: RankShards, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers of the rank, the token ids included."""
    return block_size * (kv_entries_per_token(spec, shards) * dtype.itemsize + _TOKEN_ID_BYTES)


def choose_num_blocks(
    config: WorkerConfig, spec: ModelSpec, shards: RankShards, dtype: torch.dtype, device: torch.device
) -> int:
    """How many blocks this rank's cache gets.

    ``config.num_blocks`` if it is set; else what ``kv_cache_memory_bytes`` holds if that is set; else on CUDA what
    ``gpu_memory_utilization`` of the device leaves free, and on CPU what ``max_num_seqs`` sequences of
    ``max_model_len`` need, at most 1 GiB and a quarter of the free memory, shared by the host's ranks. Never more than
    the rows can use. Raises InvalidConfig, saying what would fit, when one sequence of ``max_model_len`` would not, or
    when there is not enough free memory.
    """
    size = block_bytes(spec, shards, config.block_size, dtype)
    per_sequence = math.ceil(config.max_model_len / config.block_size)
    free = free_memory(device)
    if config.num_blocks > 0:
        fitting = free // size
        if config.num_blocks > fitting:
            found = f"{config.num_blocks} blocks of {size} bytes"
            raise InvalidConfig("num_gpu_blocks_override", found, f"at most {fitting} ({free} bytes are free)")
        return config.num_blocks
    if config.kv_cache_memory_bytes > 0:
        field, budget = "kv_cache_memory_bytes", config.kv_cache_memory_bytes
        if budget > free:
            raise InvalidConfig(field, budget, f"at most {free} bytes, which are free")
    elif device.type == "cpu":
        field, budget = "max_model_len", min(CPU_DEFAULT_LIMIT, free // 4 // max(config.local_ranks, 1))
    else:
        field, budget = "gpu_memory_utilization", _device_budget(config.gpu_memory_utilization, device)
    blocks = budget // size
    if blocks < per_sequence:
        raise _too_small(config, field, budget, size, per_sequence)
    return min(blocks, per_sequence * config.max_num_seqs)


def _too_small(config: WorkerConfig, field: str, budget: int, size: int, per_sequence: int) -> InvalidConfig:
    fitting_len = max(budget, 0) // size * config.block_size
    found = {
        "max_model_len": f"{config.max_model_len} with {budget} bytes for the KV cache",
        "kv_cache_memory_bytes": f"{budget} bytes with a max_model_len of {config.max_model_len}",
        "gpu_memory_utilization": f"{config.gpu_memory_utilization}, which leaves {max(budget, 0)} bytes",
    }[field]
    valid = (
        f"{per_sequence * size} bytes or more for a max_model_len of {config.max_model_len}, "
        f"or a max_model_len of at most {fitting_len}"
    )
    return InvalidConfig(field, found, valid)


def _device_budget(utilization: float, device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on ``device``: on CPU what the system and the process's cgroup leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = [_available_to_host()]
    limit, current = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and current is not None:
        available.append(max(limit - current, 0))
    return min(available)


def _available_to_host() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return CPU_DEFAULT_LIMIT * 4


def _read_number(path: str) -> int | None:
    """The number in a one-line file; None when there is no such file or it says ``max``."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
