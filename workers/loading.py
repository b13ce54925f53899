"""Weights from safetensors files, read by slice straight into place.

Only the bytes that this rank holds are read. The index of the checkpoint has checked every file against its header
before; what is checked here is that the tensors are those of the model.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex, TensorEntry
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.weights import EXPERT, ModelWeights, Piece

Progress = Callable[[int, int], None]

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Written by older versions of transformers; computed from the config here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class LoadPlan:
    """Which pieces of the checkpoint's tensors go where."""

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        self.targets: dict[str, list[tuple[Tensor, Piece]]] = {}

    def add(self, name: str, target: Tensor, piece: Piece) -> None:
        """Fill ``target`` (a view of a weight) with ``piece`` of tensor ``name``; several targets may take the same.

        A one-dimensional piece fills every row of a two-dimensional target.
        """
        self.targets.setdefault(name, []).append((target, piece))

    def knows(self, name: str) -> bool:
        """Whether the model has a tensor ``name``, here or on another rank, or none that it computes with."""
        if name in self.weights.by_name or name.endswith(_IGNORED_SUFFIXES):
            return True
        expert = _EXPERT.search(name)
        if expert is not None and name.replace(expert[0], f".experts.{EXPERT}.") in self.weights.by_name:
            return int(expert[1]) < self.weights.spec.num_experts
        found = _LAYER.match(name)
        # Layers beyond the last one predict further tokens in training (DeepSeek-V3).
        is_extra = found is not None and int(found[1]) >= self.weights.spec.num_layers
        if self.weights.spec.tie_word_embeddings and name == "lm_head.weight":
            return True
        return is_extra and self.weights.spec.mla is not None


def resolve_dtype(requested: str, index: CheckpointIndex) -> torch.dtype:
    """The dtype to compute in; ``auto`` is that of the checkpoint where all of it is in float32 or bfloat16, else
    float32. Raises InvalidConfig for a dtype that is not supported."""
    if requested != "auto":
        if requested not in COMPUTE_DTYPES:
            raise InvalidConfig("dtype", requested, "auto, " + ", ".join(COMPUTE_DTYPES))
        return COMPUTE_DTYPES[requested]
    # A correction bias may be float32 among bfloat16 weights: what most bytes are in decides.
    sizes: dict[str, int] = {}
    for name in index:
        entry = index[name]
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return torch.bfloat16 if sizes and max(sizes, key=lambda dtype: sizes[dtype]) == "BF16" else torch.float32


def load_weights(plan: LoadPlan, index: CheckpointIndex, progress: Progress | None = None) -> int:
    """Fill every target of ``plan`` and return how many bytes were read.

    ``progress(done, total)`` is called in bytes after each tensor. Raises InvalidConfig for tensors that are missing,
    that the model does not know, that have another shape, or whose file changed since the index was opened.
    """
    _refuse_unknown(plan, index)
    return read_planned(plan, index, progress)


def read_planned(plan: LoadPlan, index: CheckpointIndex, progress: Progress | None = None) -> int:
    """As :func:`load_weights`, for a part of a model whose checkpoint has been loaded from before: what else is in it
    is not looked at."""
    entries = sorted((index[name] for name in plan.targets), key=lambda entry: (entry.path, entry.start))
    for entry in entries:
        _check(entry, plan.targets[entry.name])
    sizes = [_piece_bytes(entry, plan.targets[entry.name]) for entry in entries]
    total, done = sum(sizes), 0
    for path, group in groupby(zip(entries, sizes, strict=True), key=lambda pair: pair[0].path):
        try:
            with Path(path).open("rb", buffering=0) as file:
                for entry, size in group:
                    _read_targets(file, entry, plan.targets[entry.name])
                    done += size
                    if progress is not None:
                        progress(done, total)
        except OSError as error:
            raise InvalidConfig("model", f"{path}: {error}", "readable safetensors files") from error
    return done


def _refuse_unknown(plan: LoadPlan, index: CheckpointIndex) -> None:
    unknown = sorted(name for name in index if not plan.knows(name))
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise InvalidConfig("model", f"tensors that the architecture does not have: {shown}", "its own tensors only")


def _check(entry: TensorEntry, targets: list[tuple[Tensor, Piece]]) -> None:
    if entry.dtype not in _DTYPES:
        raise InvalidConfig("model", f"{entry.name} in {entry.dtype}", "tensors in " + ", ".join(_DTYPES))
    for _, piece in targets:
        expected = piece.weight.shape
        if entry.shape != expected:
            raise InvalidConfig(
                "model", f"{entry.name} of shape {list(entry.shape)}", f"shape {list(expected)}, as config.json says"
            )


def _piece_bytes(entry: TensorEntry, targets: list[tuple[Tensor, Piece]]) -> int:
    return sum(math.prod(piece.shape) for piece in {piece for _, piece in targets}) * _DTYPES[entry.dtype].itemsize


def _read_targets(file: BinaryIO, entry: TensorEntry, targets: list[tuple[Tensor, Piece]]) -> None:
    """Each different piece is read once, however many targets it has."""
    read: dict[Piece, Tensor] = {}
    for target, piece in targets:
        source = read.get(piece)
        if source is None:
            source = read[piece] = _read_piece(file, entry, piece, target)
        if source is not target:
            target.copy_(source)


def _read_piece(file: BinaryIO, entry: TensorEntry, piece: Piece, target: Tensor) -> Tensor:
    """The piece as a tensor of the checkpoint's dtype: ``target`` itself where it can be read straight into place."""
    dtype = _DTYPES[entry.dtype]
    if any(span != (0, size) for span, size in list(zip(piece.spans, entry.shape, strict=True))[1:]):
        return _read_columns(file, entry, piece, dtype)
    direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    source = target if direct and tuple(target.shape) == piece.shape else torch.empty(piece.shape, dtype=dtype)
    rows = entry.shape[0] if entry.shape else 1
    first = piece.spans[0][0] if piece.spans else 0
    file.seek(entry.start + first * (entry.nbytes // rows if rows else 0))
    _fill(file, entry, source)
    return source


def _read_columns(file: BinaryIO, entry: TensorEntry, piece: Piece, dtype: torch.dtype) -> Tensor:
    """A piece that takes some columns of each row: mapped, so that only the pages which hold them are read."""
    (first_row, end_row), (first, end) = piece.spans
    row_bytes = entry.shape[1] * dtype.itemsize
    offset = entry.start + first_row * row_bytes
    base = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - base + (end_row - first_row) * row_bytes
    if os.fstat(file.fileno()).st_size < base + length:
        raise _shorter(entry, os.fstat(file.fileno()).st_size - entry.start)
    if not length:
        return torch.empty(piece.shape, dtype=dtype)
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=base) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapped, dtype=np.uint8, count=(end_row - first_row) * row_bytes, offset=offset - base)
        columns = rows.reshape(-1, row_bytes)[:, first * dtype.itemsize : end * dtype.itemsize].copy()
        del rows
    return torch.from_numpy(columns).view(dtype)


def _fill(file: BinaryIO, entry: TensorEntry, tensor: Tensor) -> None:
    """Read the tensor's bytes into the memory of a contiguous CPU ``tensor``."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    position = 0
    while position < len(view):
        count = file.readinto(view[position:])  # type: ignore[attr-defined]
        if not count:
            raise _shorter(entry, position)
        position += count


def _shorter(entry: TensorEntry, position: int) -> InvalidConfig:
    return InvalidConfig(
        "model",
        f"{entry.path}: {entry.name} ends after {max(position, 0)} bytes",
        f"{entry.nbytes} bytes (the file changed while it was read)",
    )
