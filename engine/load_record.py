"""The expert load that an engine has seen, as a file: numpy arrays in an .npz, never anything that runs code."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from drumline.protocol.errors import DrumlineError, InvalidConfig
from drumline.protocol.messages import I32, ExpertLoad

I64: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MAX_FILE_BYTES = 1 << 30
"""Of all arrays of a file, unpacked."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoadRecord:
    """``tokens``: int64 (snapshots, moe_layers, experts), what each logical expert has computed, oldest first;
    ``steps``: int64 (snapshots,), steps that each covers. ``physical_to_logical``: int32 (moe_layers, slots), the
    placement when it was taken. No snapshots: nothing has been counted yet."""

    tokens: I64
    steps: I64
    physical_to_logical: I32

    @classmethod
    def of(cls, load: ExpertLoad) -> ExpertLoadRecord:
        """What the coordinator says of its window."""
        tokens = load.tokens.reshape(len(load.steps), load.num_layers, -1) if len(load.steps) else np.zeros((0, 0, 0))
        return cls(tokens.astype(np.int64), load.steps.astype(np.int64), load.placement)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, which is the former one or this one whole at every moment. Raises OSError."""
        target = Path(path).expanduser()
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(
                    file, tokens=self.tokens, steps=self.steps, physical_to_logical=self.physical_to_logical
                )
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def save_load(record: ExpertLoadRecord, path: str | os.PathLike[str]) -> None:
    """As :meth:`ExpertLoadRecord.save`, for an app. Raises DrumlineError when the file cannot be written."""
    try:
        record.save(path)
    except OSError as error:
        raise DrumlineError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def check_record_path(field: str, path: str) -> None:
    """Raises InvalidConfig, which names ``field``, for a file that cannot be made."""
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        raise InvalidConfig(field, path, "a file in a folder that exists")


def read_arrays(field: str, path: Path) -> Mapping[str, Array]:
    """The arrays of an .npz by name. Raises InvalidConfig, which names ``field`` and the file."""
    valid = f"an .npz of plain arrays, at most {MAX_FILE_BYTES} bytes of them"
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > MAX_FILE_BYTES:
            raise InvalidConfig(field, f"{path}: arrays of {size} bytes", valid)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise InvalidConfig(field, f"{path}: {error.strerror or error}", valid) from error
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, MemoryError) as error:
        raise InvalidConfig(field, f"{path}: {error}", valid) from error
