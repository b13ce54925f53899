"""A layout that somebody asks about: a model, the sizes of a world, and the GPUs that are there."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.first_placement import strategy_placement
from drumline.engine.known_models import known_models, known_spec
from drumline.engine.parallel_layout import balances, parallel_layout
from drumline.engine.resolve import DEMO, compute_dtype, longest_context, model_folder
from drumline.protocol.configfields import read_json_object
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import I32

MAX_GPUS = 4096
"""More are refused: a report of them would be read by nobody."""
_MODELS = f'a folder with a config.json, a config.json, "{DEMO}", or a known name'
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`~drumline.engine.layout_report.report.report` answers. Made by :func:`ask`, which checks it.

    ``dtype``, ``kv_cache_dtype``: resolved, never "auto". ``gpu_memory``: bytes of one GPU, None when unknown; of it
    ``gpu_memory_utilization`` may be used. ``notes``: what a user should know about how the model was read.
    ``device``: what the ranks compute on, cuda or cpu.
    """

    model: str
    spec: ModelSpec
    parallel: ParallelConfig
    layout: Layout
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    block_size: int
    num_gpus: int
    gpu_memory: int | None
    gpu_memory_utilization: float
    notes: tuple[str, ...] = ()
    device: str = "cuda"

    @property
    def stages_experts(self) -> bool:
        """Whether ranks have staging buffers for experts that come while they compute."""
        return balances(self.parallel, self.layout)

    @property
    def usable_memory(self) -> int | None:
        """Bytes of one GPU that weights and KV may take."""
        return None if self.gpu_memory is None else int(self.gpu_memory * self.gpu_memory_utilization)

    def first_placement(self) -> I32 | None:
        """The placement that the model starts with where no file says another, int32 (moe_layers, slots); None for a
        dense one."""
        return strategy_placement(self.parallel, self.spec, self.layout) if self.spec.is_moe else None

    def resized(self, parallel: ParallelConfig) -> Question:
        """The same about other sizes. Raises InvalidConfig when the model cannot have them."""
        return msgspec.structs.replace(self, parallel=parallel, layout=parallel_layout(parallel, self.spec))


def ask(
    config: EngineConfig,
    *,
    spec: ModelSpec | None = None,
    num_gpus: int | None = None,
    gpu_memory: int | None = None,
    device: str = "cuda",
) -> Question:
    """A question whose parts go together. Of ``config`` count the model, the sizes, the dtypes, the longest context,
    block size and memory utilization.

    ``spec``: the model's shape; None reads it (:func:`read_model`). ``num_gpus``: None means as many as ranks.
    ``gpu_memory``: bytes of one. ``device``: cuda or cpu. Raises InvalidConfig, naming the field, what was found,
    what is valid.
    """
    notes: tuple[str, ...] = ()
    if spec is None:
        spec, notes = read_model(config.model)
    parallel = config.parallel
    if parallel.world_size_across_dp > MAX_GPUS:
        valid = f"at most {MAX_GPUS // parallel.world_size} with tp * pp = {parallel.world_size}"
        raise InvalidConfig("data_parallel_size", parallel.data_parallel_size, valid)
    layout = parallel_layout(parallel, spec)
    num_gpus = layout.num_ranks if num_gpus is None else num_gpus
    if not layout.num_ranks <= num_gpus <= MAX_GPUS:
        sizes = f"dp {layout.data_parallel_size} x pp {layout.pipeline_parallel_size} x tp "
        valid = f"{layout.num_ranks}, the ranks of {sizes}{layout.tensor_parallel_size}, to {MAX_GPUS}"
        raise InvalidConfig("num_gpus", num_gpus, valid)
    dtype, kv_cache_dtype = compute_dtype(config, spec), config.cache.kv_cache_dtype
    if config.dtype == "auto" and dtype != spec.dtype:
        notes = (*notes, f"the checkpoint is {spec.dtype}; bytes are those of {dtype}, in which it is computed")
    return Question(
        model=config.model,
        spec=spec,
        parallel=parallel,
        layout=layout,
        dtype=dtype,
        kv_cache_dtype=dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
        max_model_len=longest_context(config, spec),
        block_size=config.cache.block_size,
        num_gpus=num_gpus,
        gpu_memory=gpu_memory,
        gpu_memory_utilization=config.cache.gpu_memory_utilization,
        notes=notes,
        device=device,
    )


def read_model(model: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """The shape of ``model`` and notes about it: a folder with config.json, a config.json, "demo", or a known name.

    Raises InvalidConfig.
    """
    path = _config_path(model)
    if path is None:
        return _known(model), ()
    values: dict[str, Any] = read_json_object(path)
    spec = ModelSpec.from_config(values, path, allow_quantized=True)
    if not values.get("quantization_config"):
        return spec, ()
    return spec, ("the checkpoint is quantized; bytes are those of its weights before that",)


def _config_path(model: str) -> Path | None:
    """Where the config.json lies; None for what looks like a name."""
    if model == DEMO:
        return model_folder(DEMO) / "config.json"
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path / "config.json"
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:
        # A name that is too long, a folder that may not be entered, the home of nobody.
        raise InvalidConfig("model", f"{model}: {error}", _MODELS) from error
    if "/" in model or model.endswith(".json"):
        raise InvalidConfig("model", model, _MODELS)
    return None


def _known(name: str) -> ModelSpec:
    known = known_models()
    if name.lower() not in known:
        raise InvalidConfig("model", name, f"{_MODELS}: {', '.join(known)}")
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
