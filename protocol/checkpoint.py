"""Where each tensor of a safetensors checkpoint lies, found without torch and without reading the tensors.

A folder holds either ``model.safetensors`` or ``model.safetensors.index.json`` with its shards. Every header is checked
against the real length of its file when the index is opened, so a download that was cut short fails at the start, with
both figures, and not in the middle of loading. The format: https://huggingface.co/docs/safetensors (8 bytes little
endian header length, a JSON header, then the data; offsets count from the end of the header).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from drumline.protocol.errors import InvalidConfig

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


class TensorEntry(msgspec.Struct, frozen=True, gc=False):
    """One tensor: bytes ``start`` to ``end`` of ``path`` (counted from the start of the file), row-major."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.end - self.start


class CheckpointIndex:
    """All tensors of a checkpoint by name. Made by :meth:`open`; holds no file open."""

    def __init__(self, folder: Path, entries: dict[str, TensorEntry]) -> None:
        self.folder = folder
        self._entries = entries

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointIndex:
        """Read the headers of every file of the checkpoint in ``folder``.

        Raises InvalidConfig for a folder without safetensors, a missing shard, a header that does not parse or does
        not fit, and a file that is shorter or longer than its header says (with the bytes expected and found).
        """
        folder = Path(folder)
        single = folder / SINGLE_NAME
        if single.is_file():
            return cls(folder, _read_header(single))
        index = folder / INDEX_NAME
        if index.is_file():
            return cls(folder, _read_shards(folder, index))
        raise InvalidConfig("model", str(folder), f"a folder with {SINGLE_NAME} or {INDEX_NAME} and its shards")

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> TensorEntry:
        """The entry of ``name``; raises InvalidConfig that names the tensor and the folder when there is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise InvalidConfig("model", f"no tensor {name} in {self.folder}", f"a checkpoint that holds {name}")
        return entry

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def read(self, name: str, first_row: int = 0, end_row: int | None = None) -> bytearray:
        """The bytes of rows ``first_row`` to ``end_row`` (along the first dimension; default all) of a tensor.

        Only those bytes are read. A tensor without dimensions counts as one row. The buffer is the caller's own, so
        ``torch.frombuffer`` or ``numpy.frombuffer`` may write to it. Raises InvalidConfig for an unknown name, rows
        that are not there and a file that has changed since :meth:`open`.
        """
        entry = self[name]
        rows = entry.shape[0] if entry.shape else 1
        end = rows if end_row is None else end_row
        if not 0 <= first_row <= end <= rows:
            raise InvalidConfig("model", f"rows {first_row} to {end} of {name}", f"0 to {rows}")
        row_bytes = entry.nbytes // rows if rows else 0
        buffer = bytearray((end - first_row) * row_bytes)
        _fill(entry.path, entry.start + first_row * row_bytes, buffer)
        return buffer


def _fill(path: str, offset: int, buffer: bytearray) -> None:
    done = 0
    try:
        # One open per read: a rank reads a few hundred ranges, and an index that holds no file cannot leak one.
        with Path(path).open("rb", buffering=0) as file, memoryview(buffer) as view:
            file.seek(offset)
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as error:
        raise InvalidConfig("model", f"{path}: {error}", "a readable safetensors file") from error
    if done < len(buffer):
        raise InvalidConfig(
            "model",
            f"{path}: cut short, {offset + done} bytes where {offset + len(buffer)} are needed",
            "a complete safetensors file",
        )


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_weight_map(index)
    headers: dict[str, dict[str, TensorEntry]] = {}
    missing = []
    for shard in dict.fromkeys(weight_map.values()):
        # A shard is a plain file name: an index must not make us read elsewhere.
        if not shard or shard in (".", "..") or "/" in shard or "\0" in shard:
            raise _invalid(index, f"shard name {shard!r}", "the name of a file beside the index")
        if (folder / shard).is_file():
            headers[shard] = _read_header(folder / shard)
        else:
            missing.append(shard)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise _invalid(index, f"missing shards: {shown}", f"all {len(missing) + len(headers)} shards in {folder}")
    entries = {}
    for name, shard in weight_map.items():
        entry = headers[shard].get(name)
        if entry is None:
            raise _invalid(index, f"tensor {name} is not in {shard}", "shards that hold what the index says")
        entries[name] = entry
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        size = index.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise _invalid(index, f"{size} bytes", f"at most {MAX_INDEX_BYTES} bytes")
        value = json.loads(index.read_bytes())
    except OSError as error:
        raise _invalid(index, str(error), "a readable file") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(index, f"text that is not JSON ({error})", "a JSON object with weight_map") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid(index, "no weight_map", "a JSON object whose weight_map maps tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _invalid(index, f"{shard!r} as the file of {name}", "a file name")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _invalid(path, f"cut short: {size} bytes", "at least the 8 bytes of the header's length")
            length = int.from_bytes(prefix, "little")
            # Checked before anything is read: a damaged length must not become an allocation.
            if length > MAX_HEADER_BYTES:
                raise _invalid(path, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES} bytes")
            if 8 + length > size:
                raise _invalid(path, f"cut short: {size} bytes", f"{8 + length} bytes for the header alone")
            raw = file.read(length)
    except OSError as error:
        raise _invalid(path, str(error), "a readable file") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"a header that is not JSON ({error})", "a safetensors header") from error
    if not isinstance(header, dict):
        raise _invalid(path, f"a header of type {type(header).__name__}", "a JSON object")
    return _check_header(path, header, 8 + length, size)


def _check_header(path: Path, header: dict[str, Any], base: int, size: int) -> dict[str, TensorEntry]:
    entries = [_read_entry(path, name, value, base) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = base
    for entry in entries:
        if entry.start != position:
            raise _invalid(path, f"{entry.name} begins at byte {entry.start}", f"byte {position} (no gap, no overlap)")
        position = entry.end
    if size < position:
        raise _invalid(path, f"cut short: {size} bytes", f"{position} bytes, as its header says")
    if size > position:
        raise _invalid(path, f"{size} bytes, {size - position} too many", f"{position} bytes, as its header says")
    return {entry.name: entry for entry in entries}


def _read_entry(path: Path, name: str, value: object, base: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _invalid(path, f"a header entry of type {type(value).__name__} for {name}", "an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _invalid(path, f"dtype {dtype!r} of {name}", "one of " + ", ".join(DTYPE_BYTES))
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise _invalid(path, f"shape {shape!r} of {name}", "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _invalid(path, f"data_offsets {offsets!r} of {name}", "two byte positions")
    start, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        raise _invalid(path, f"{end - start} bytes for {name}", f"{expected} bytes for {dtype} {shape}")
    return TensorEntry(name, str(path), dtype, tuple(shape), base + start, base + end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _invalid(path: Path, found: str, valid: str) -> InvalidConfig:
    return InvalidConfig("model", found, valid, f"{path}: found {found}; valid: {valid}")
