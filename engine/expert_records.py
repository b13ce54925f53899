"""What was seen of expert loads and where experts stood, as files: written by an engine, read by the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from drumline.engine.array_files import Array, ArrayFile, save_arrays
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix

F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
I32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
I64: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

TOKENS, STEPS, PLACEMENT = "tokens", "steps", "physical_to_logical"
MAX_TOKENS = 1e30
"""Of one expert: sums over all of them must stay numbers in float32."""
MAX_NUMBERS = 1 << 28
_COUNTS = f"finite numbers from 0 to {MAX_TOKENS:g}"


class LoadRecord(msgspec.Struct, frozen=True, eq=False):
    """Expert loads over time, and the placement that stood at their end.

    ``tokens``: float64 (snapshots, MoE layers, experts), tokens of each logical expert; ``steps``: int64 (snapshots,),
    over how many steps each was counted; ``physical_to_logical``: int32 (MoE layers, slots).
    """

    tokens: F64
    steps: I64
    physical_to_logical: I32Matrix

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return int(self.tokens.shape[2])


def save_load_record(path: Path, record: LoadRecord) -> None:
    """Write ``record`` in one piece. Raises DrumlineError when the file cannot be written."""
    arrays: dict[str, Array] = {TOKENS: record.tokens, STEPS: record.steps, PLACEMENT: record.physical_to_logical}
    save_arrays(path, arrays)


def save_placements(path: Path, placements: I32) -> None:
    """Write int32 (time, MoE layers, slots) as ``physical_to_logical``. Raises DrumlineError."""
    save_arrays(path, {PLACEMENT: placements})


def read_load_record(path: Path, field: str = "load_record") -> LoadRecord:
    """The record in ``path``. ``field``: what errors name. Raises InvalidConfig with the file, what was found in it,
    and what is valid."""
    with ArrayFile(path, field) as file:
        return _load_record(file)


def read_expert_placement(path: Path, field: str = "init_expert_placement") -> LoadRecord | I32Matrix:
    """What an engine may start from: a load record, or a placement, int32 (MoE layers, slots).

    A placement is a .json object or an .npz file with ``physical_to_logical``; of one that has a dimension of time the
    last counts. Whether it suits a model is for its reader to check. Raises InvalidConfig.
    """
    if path.suffix.lower() == ".json":
        return _json_placement(path, field)
    with ArrayFile(path, field) as file:
        return _load_record(file) if TOKENS in file.names else _placement(file)


def read_loads(path: Path, key: str | None = None, field: str = "loads") -> F64:
    """float64 (time, layers, experts) from anybody's .npz or .npy file: an array (layers, experts) is one time.

    ``key``: which array; it may be left out when there is one, or when the file is a load record. Raises InvalidConfig
    for whatever are not finite numbers from 0 in two or three dimensions.
    """
    with ArrayFile(path, field) as file:
        return _loads(file, _chosen(file) if key is None else key)


def _chosen(file: ArrayFile) -> str:
    if len(file.names) == 1:
        return file.names[0]
    if TOKENS in file.names:
        return TOKENS
    raise file.invalid(f"{len(file.names)} arrays ({', '.join(file.names)})", "a key that says which")


def _load_record(file: ArrayFile) -> LoadRecord:
    tokens, placement = _loads(file, TOKENS, dimensions=(3,)), _placement(file)
    steps = file.read(STEPS)
    if steps.shape != tokens.shape[:1] or steps.dtype.kind not in "iu" or steps.min(initial=0) < 0:
        raise file.invalid(
            f"{STEPS} of {steps.dtype} {steps.shape}", f"whole numbers from 0, as many as snapshots: {len(tokens)}"
        )
    if len(placement) != tokens.shape[1]:
        found = f"{PLACEMENT} of {len(placement)} layers and {TOKENS} of {tokens.shape[1]}"
        raise file.invalid(found, "the same number of layers")
    if placement.max() >= tokens.shape[2]:
        raise file.invalid(f"expert {placement.max()} in {PLACEMENT}", f"0 to {tokens.shape[2] - 1}, as in {TOKENS}")
    return LoadRecord(tokens, steps.astype(np.int64), placement)


def _loads(file: ArrayFile, key: str, dimensions: tuple[int, ...] = (2, 3)) -> F64:
    array = file.read(key)
    if array.ndim not in dimensions or not array.size:
        valid = "(time, layers, experts), each from 1" + (", or (layers, experts)" if 2 in dimensions else "")
        raise file.invalid(f"array {key!r} of shape {array.shape}", valid)
    if array.size > MAX_NUMBERS:
        raise file.invalid(f"{array.size:,} numbers in array {key!r}", f"at most {MAX_NUMBERS:,}")
    tokens = array.astype(np.float64)
    wrong = ~((tokens >= 0) & (tokens <= MAX_TOKENS))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise file.invalid(f"{array[place]} at {place} of array {key!r}", _COUNTS)
    return tokens if tokens.ndim == 3 else tokens[None]


def _placement(file: ArrayFile) -> I32Matrix:
    array = file.read(PLACEMENT)
    if array.ndim == 3 and len(array):
        array = array[-1]
    return _checked_placement(array, file.path, file.field)


def _json_placement(path: Path, field: str) -> I32Matrix:
    valid = f'a JSON object with "{PLACEMENT}": a list of experts for each MoE layer'
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        rows = msgspec.convert(found.get(PLACEMENT), list[list[int]])
        array = np.array(rows, dtype=np.int64)
    except OSError as error:
        raise InvalidConfig(field, f"{(error.strerror or str(error)).lower()} at {path}", valid) from error
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidConfig(field, f"{' '.join(str(error).split())} in {path}", valid) from error
    return _checked_placement(array, path, field)


def _checked_placement(array: Array, path: Path, field: str) -> I32Matrix:
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        found = f"{PLACEMENT} of {array.dtype} {array.shape} in {path}"
        raise InvalidConfig(field, found, "whole numbers (MoE layers, slots), each from 1")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise InvalidConfig(field, f"expert {min(array.min(), 0) or array.max()} in {path}", "experts from 0")
    return array.astype(np.int32)
