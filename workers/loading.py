"""Weights from safetensors files, read by slice straight into place.

Only the bytes that this rank holds are read. The index of the checkpoint has checked every file against its header
before; what is checked here is that the tensors are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex, TensorEntry
from drumline.protocol.errors import InvalidConfig

Progress = Callable[[int, int], None]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Written by older versions of transformers; computed from the config here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(slots=True)
class LoadPlan:
    """Which tensor of the checkpoint goes where. ``left`` are names that belong to the model but not to this rank."""

    targets: dict[str, list[Tensor]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)

    def add(self, name: str, target: Tensor) -> None:
        """Fill ``target`` (a view of a weight) with tensor ``name``; several targets may take the same one.

        A one-dimensional tensor fills every row of a two-dimensional target.
        """
        self.targets.setdefault(name, []).append(target)

    def leave(self, name: str) -> None:
        """``name`` may be in the checkpoint and is not read."""
        self.left.add(name)


def resolve_dtype(requested: str, index: CheckpointIndex) -> torch.dtype:
    """The dtype to compute in; ``auto`` is that of the checkpoint. Raises InvalidConfig for all but float32."""
    if requested == "float32":
        return torch.float32
    if requested != "auto":
        raise InvalidConfig("dtype", requested, "auto or float32")
    found = sorted({_NAMES.get(index[name].dtype, index[name].dtype) for name in index})
    if found != ["float32"]:
        stored = ", ".join(found)
        raise InvalidConfig("dtype", f"auto with a checkpoint in {stored}", "float32 (the checkpoint is converted)")
    return torch.float32


def load_weights(plan: LoadPlan, index: CheckpointIndex, progress: Progress | None = None) -> int:
    """Fill every target of ``plan`` and return how many bytes were read.

    ``progress(done, total)`` is called in bytes after each tensor. Raises InvalidConfig for tensors that are missing,
    that the model does not know, that have another shape, or whose file changed since the index was opened.
    """
    _refuse_unknown(plan, index)
    entries = sorted((index[name] for name in plan.targets), key=lambda entry: (entry.path, entry.start))
    for entry in entries:
        _check(entry, plan.targets[entry.name])
    total = sum(entry.nbytes for entry in entries)
    done = 0
    for path, group in groupby(entries, key=lambda entry: entry.path):
        try:
            with Path(path).open("rb", buffering=0) as file:
                for entry in group:
                    _read_tensor(file, entry, plan.targets[entry.name])
                    done += entry.nbytes
                    if progress is not None:
                        progress(done, total)
        except OSError as error:
            raise InvalidConfig("model", f"{path}: {error}", "readable safetensors files") from error
    return done


def _refuse_unknown(plan: LoadPlan, index: CheckpointIndex) -> None:
    unknown = sorted(
        name
        for name in index
        if name not in plan.targets and name not in plan.left and not name.endswith(_IGNORED_SUFFIXES)
    )
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise InvalidConfig("model", f"tensors that the architecture does not have: {shown}", "its own tensors only")


def _check(entry: TensorEntry, targets: list[Tensor]) -> None:
    if entry.dtype not in _DTYPES:
        raise InvalidConfig("model", f"{entry.name} in {entry.dtype}", "tensors in " + ", ".join(_DTYPES))
    for target in targets:
        expected = tuple(target.shape)
        if entry.shape not in (expected, expected[1:]):
            raise InvalidConfig(
                "model", f"{entry.name} of shape {list(entry.shape)}", f"shape {list(expected)}, as config.json says"
            )


def _read_tensor(file: BinaryIO, entry: TensorEntry, targets: list[Tensor]) -> None:
    target = targets[0]
    dtype = _DTYPES[entry.dtype]
    file.seek(entry.start)
    direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    if direct and tuple(target.shape) == entry.shape:
        _fill(file, entry, target)
        source = target
    else:
        source = torch.empty(entry.shape, dtype=dtype)
        _fill(file, entry, source)
        target.copy_(source)
    for other in targets[1:]:
        other.copy_(source)


def _fill(file: BinaryIO, entry: TensorEntry, tensor: Tensor) -> None:
    """Read the tensor's bytes into the memory of a contiguous CPU ``tensor``."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    position = 0
    while position < len(view):
        count = file.readinto(view[position:])  # type: ignore[attr-defined]
        if not count:
            raise InvalidConfig(
                "model",
                f"{entry.path}: {entry.name} ends after {position} bytes",
                f"{entry.nbytes} bytes (the file changed while it was read)",
            )
        position += count
