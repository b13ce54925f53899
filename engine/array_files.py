"""Arrays in files of numpy's (.npz, .npy), read without trust: nothing in them is run, and all trouble is typed."""

from __future__ import annotations

import contextlib
import struct
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from drumline.protocol.errors import DrumlineError, InvalidConfig

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MAX_ARRAY_BYTES = 2 << 30
_TROUBLE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayFile:
    """The named arrays of a file; a .npy file has one, named after the file. ``field``: what errors name.

    ``names``: of its arrays, in their order. Close it after use.
    """

    def __init__(self, path: Path, field: str) -> None:
        self.path = path
        self.field = field
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("rb")
            opened = np.load(self._file, allow_pickle=False)
        except _TROUBLE as error:
            self.close()
            raise self.invalid(_why(error), "an .npz file of numbers") from error
        self._archive = opened if isinstance(opened, np.lib.npyio.NpzFile) else None
        self._arrays: dict[str, Array] = {} if self._archive is not None else {path.stem: opened}
        self.names: tuple[str, ...] = tuple(self._arrays if self._archive is None else self._archive.files)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def read(self, name: str) -> Array:
        """The array ``name``, of whole or floating-point numbers. Raises InvalidConfig, naming file and array."""
        if name not in self.names:
            raise self.invalid(f"no array {name!r}", "one of " + ", ".join(self.names) if self.names else "an array")
        try:
            array = self._arrays[name] if self._archive is None else self._from(self._archive, name)
        except _TROUBLE as error:
            raise self.invalid(f"array {name!r}: {_why(error)}", "an array of numbers") from error
        if array.dtype.kind not in "iuf":
            raise self.invalid(f"array {name!r} of {array.dtype}", "an array of whole or floating-point numbers")
        return array

    def invalid(self, found: str, valid: str) -> InvalidConfig:
        """The error that says what was found in this file."""
        return InvalidConfig(self.field, f"{found} in {self.path}", valid)

    def _from(self, archive: Any, name: str) -> Array:
        for member in archive.zip.infolist():
            if member.filename in (name, name + ".npy") and member.file_size > MAX_ARRAY_BYTES:
                raise ValueError(f"{member.file_size} bytes; the limit is {MAX_ARRAY_BYTES}")
        array = archive[name]
        if not isinstance(array, np.ndarray):
            raise ValueError("not an array")
        return array


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an .npz file; a reader sees the old one or the new one. Raises DrumlineError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DrumlineError(f"{path} cannot be written: {error.strerror}") from error


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "pickle" in str(error):
        return "no numbers but objects, or no file of numpy's"
    return " ".join(str(error).split()) or type(error).__name__
