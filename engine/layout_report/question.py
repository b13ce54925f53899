"""A layout that somebody asks about: a model, the sizes of a world, and the GPUs that are there."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from drumline.engine.known_models import known_models, known_spec
from drumline.protocol.configfields import read_json_object
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import PLACEMENT_STRATEGIES, Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import I32, initial_placement
from drumline.protocol.shards import attention_replicas, check_model

DEMO = "demo"
COMPUTE_DTYPES = ("float32", "bfloat16")
MAX_RANKS = 4096
SIZE_FLAGS = (("-tp", "tensor_parallel_size"), ("-pp", "pipeline_parallel_size"), ("-dp", "data_parallel_size"))
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a world as a user gives them; names and defaults are those of ``ParallelConfig``."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement_strategy: str = "linear"
    enable_dp_attention: bool = False
    pipeline_partition: tuple[int, ...] = ()

    def layout(self, spec: ModelSpec) -> Layout:
        """The layout of ``spec`` that they make. Raises InvalidConfig, naming the field and what would do."""
        for _, field in SIZE_FLAGS:
            if not 1 <= getattr(self, field) <= MAX_RANKS:
                raise InvalidConfig(field, getattr(self, field), f"1 to {MAX_RANKS}")
        if self.expert_placement_strategy not in PLACEMENT_STRATEGIES:
            valid = "one of " + ", ".join(PLACEMENT_STRATEGIES)
            raise InvalidConfig("expert_placement_strategy", self.expert_placement_strategy, valid)
        attn_dp = attention_replicas(self.tensor_parallel_size, spec.num_kv_heads) if self.enable_dp_attention else 1
        layout = Layout(
            data_parallel_size=self.data_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            enable_expert_parallel=self.enable_expert_parallel,
            attention_data_parallel_size=attn_dp,
            pipeline_partition=self.pipeline_partition,
        )
        if layout.num_ranks > MAX_RANKS:
            raise InvalidConfig("data_parallel_size", self.data_parallel_size, f"a world of at most {MAX_RANKS} ranks")
        check_model(layout, spec)
        return layout

    def flags(self) -> str:
        """The sizes that are not 1, as flags of a command line; ``-tp 1`` when all are."""
        shown = [f"{flag} {getattr(self, field)}" for flag, field in SIZE_FLAGS if getattr(self, field) > 1]
        shown = shown or ["-tp 1"]
        if self.enable_expert_parallel:
            shown.append("--enable-expert-parallel")
        if self.enable_dp_attention:
            shown.append("--enable-dp-attention")
        return " ".join(shown)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`~drumline.engine.layout_report.report.report` answers. Made by :func:`ask`, which checks it.

    ``dtype``, ``kv_cache_dtype``: resolved, never "auto". ``gpu_memory``: bytes of one GPU, None when unknown; of it
    ``gpu_memory_utilization`` may be used. ``notes``: what a user should know about how the model was read.
    """

    model: str
    spec: ModelSpec
    sizes: Sizes
    layout: Layout
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    block_size: int
    num_gpus: int
    gpu_memory: int | None
    gpu_memory_utilization: float
    notes: tuple[str, ...] = ()

    @property
    def usable_memory(self) -> int | None:
        """Bytes of one GPU that weights and KV may take."""
        return None if self.gpu_memory is None else int(self.gpu_memory * self.gpu_memory_utilization)

    def first_placement(self) -> I32 | None:
        """The placement that the model starts with, int32 (moe_layers, experts); None for a dense one."""
        if not self.spec.is_moe:
            return None
        strategy = self.sizes.expert_placement_strategy
        return initial_placement(len(self.spec.moe_layers), self.spec.num_experts, self.layout.ep_size, strategy)

    def resized(self, sizes: Sizes) -> Question:
        """The same about other sizes. Raises InvalidConfig when the model cannot have them."""
        return msgspec.structs.replace(self, sizes=sizes, layout=sizes.layout(self.spec))


def ask(
    model: str,
    sizes: Sizes,
    *,
    spec: ModelSpec | None = None,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    block_size: int = 16,
    num_gpus: int | None = None,
    gpu_memory: int | None = None,
    gpu_memory_utilization: float = 0.9,
) -> Question:
    """A question whose parts go together. ``model``: see :func:`read_model`; with ``spec`` only what it is called.

    ``num_gpus``: None means as many as ranks. Raises InvalidConfig, naming the field, what was found, what is valid.
    """
    notes: tuple[str, ...] = ()
    if spec is None:
        spec, notes = read_model(model)
    layout = sizes.layout(spec)
    num_gpus = layout.num_ranks if num_gpus is None else num_gpus
    if num_gpus < layout.num_ranks:
        counts = f"dp {layout.data_parallel_size} x pp {layout.pipeline_parallel_size} x tp "
        valid = f"at least {layout.num_ranks}, the ranks of {counts}{layout.tensor_parallel_size}"
        raise InvalidConfig("num_gpus", num_gpus, valid)
    if num_gpus > MAX_RANKS:
        raise InvalidConfig("num_gpus", num_gpus, f"at most {MAX_RANKS}")
    if not 0.0 < gpu_memory_utilization <= 1.0:
        raise InvalidConfig("gpu_memory_utilization", gpu_memory_utilization, "a number above 0, at most 1")
    if not 1 <= block_size <= 4096:
        raise InvalidConfig("block_size", block_size, "1 to 4096")
    longest = spec.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= longest:
        raise InvalidConfig("max_model_len", max_model_len, f"1 to {longest}, the positions the model was made for")
    compute = compute_dtype("dtype", dtype, spec)
    if dtype == "auto" and compute != spec.dtype:
        notes = (*notes, f"the checkpoint is {spec.dtype}; bytes are those of {compute}, in which it is computed")
    return Question(
        model=model,
        spec=spec,
        sizes=sizes,
        layout=layout,
        dtype=compute,
        kv_cache_dtype=compute if kv_cache_dtype == "auto" else compute_dtype("kv_cache_dtype", kv_cache_dtype, spec),
        max_model_len=max_model_len or longest,
        block_size=block_size,
        num_gpus=num_gpus,
        gpu_memory=gpu_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        notes=notes,
    )


def compute_dtype(field: str, dtype: str, spec: ModelSpec) -> str:
    """The dtype that ``dtype`` comes to: "auto" is the checkpoint's, or float32 where that is not computed in.

    Raises InvalidConfig naming ``field``.
    """
    if dtype == "auto":
        return spec.dtype if spec.dtype in COMPUTE_DTYPES else "float32"
    if dtype not in COMPUTE_DTYPES:
        raise InvalidConfig(field, dtype, "one of auto, " + ", ".join(COMPUTE_DTYPES))
    return dtype


def read_model(model: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """The shape of ``model`` and notes about it: a folder with config.json, a config.json, "demo", or a known name.

    Raises InvalidConfig.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif model == DEMO:
        path = Path(__file__).parents[1] / DEMO / "config.json"
    elif not path.exists():
        if "/" in model or path.suffix == ".json":
            raise InvalidConfig("model", model, "a folder with a config.json, a config.json, or a known name")
        return _known(model), ()
    values: dict[str, Any] = read_json_object(path)
    spec = ModelSpec.from_config(values, path, allow_quantized=True)
    if not values.get("quantization_config"):
        return spec, ()
    return spec, ("the checkpoint is quantized; bytes are those of its weights before that",)


def _known(name: str) -> ModelSpec:
    known = known_models()
    if name.lower() not in known:
        valid = f"a folder with a config.json, a config.json, {DEMO}, or one of {', '.join(known)}"
        raise InvalidConfig("model", name, valid)
    return known_spec(name)


def parse_bytes(field: str, text: str) -> int:
    """Bytes of "80GiB", "80 GB", "85899345920". Raises InvalidConfig naming ``field``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else "?"
    if unit in ("K", "M", "G", "T"):
        unit += "IB"
    if found is None or unit not in _UNITS:
        raise InvalidConfig(field, text, "a number of bytes, or one with a unit, such as 80GiB or 80GB")
    number = float(found[1]) * _UNITS[unit]
    if not math.isfinite(number) or not 1 <= number <= 1 << 50:
        raise InvalidConfig(field, text, "from 1 byte to 1024 TiB")
    return int(number)
