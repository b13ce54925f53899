from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from drumline.protocol.checkpoint import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from drumline.protocol.errors import InvalidConfig

TENSORS: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
    "embed": np.arange(12, dtype=np.float32).reshape(4, 3),
    "norm": np.array([1, 2, 3], dtype=np.float16),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 5), dtype=np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_shards(folder: Path) -> dict[str, str]:
    save_file({"embed": TENSORS["embed"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"norm": TENSORS["norm"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"embed": "model-00001-of-00002.safetensors", "norm": "model-00002-of-00002.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 54}, "weight_map": weight_map}))
    return weight_map


def test_every_tensor_of_a_single_file_is_found_where_it_lies(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    index = CheckpointIndex.open(tmp_path)
    assert set(index) == set(TENSORS)
    assert len(index) == len(TENSORS)
    assert index.total_bytes == sum(t.nbytes for t in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert index[name].shape == tensor.shape
        assert index[name].nbytes == tensor.nbytes
        assert bytes(index.read(name)) == tensor.tobytes()
    assert index["norm"].dtype == "F16"
    assert "embed" in index
    assert "other" not in index


def test_rows_are_read_alone(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    index = CheckpointIndex.open(tmp_path)
    assert bytes(index.read("embed", 1, 3)) == TENSORS["embed"][1:3].tobytes()
    assert index.read("embed", 2, 2) == b""
    assert bytes(index.read("embed", 3)) == TENSORS["embed"][3:].tobytes()
    assert index.read("empty") == b""
    for first, end in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(InvalidConfig, match="0 to 4"):
            index.read("embed", first, end)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    with pytest.raises(InvalidConfig, match=r"no tensor lm_head\.weight in"):
        CheckpointIndex.open(tmp_path)["lm_head.weight"]


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = CheckpointIndex.open(tmp_path)
    assert list(index) == ["embed", "norm"]
    assert index["norm"].path.endswith("model-00002-of-00002.safetensors")
    assert bytes(index.read("norm")) == TENSORS["norm"].tobytes()


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidConfig, match=r"missing shards: model-00002-of-00002\.safetensors"):
        CheckpointIndex.open(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path) | {"extra": "model-00001-of-00002.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidConfig, match="tensor extra is not in model-00001"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "", ".", "..", "a\0b"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"embed": shard}}))
    with pytest.raises(InvalidConfig, match="shard name"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(InvalidConfig, match=r"index\.json"):
        CheckpointIndex.open(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidConfig, match=r"model\.safetensors"):
        CheckpointIndex.open(tmp_path)


def test_a_file_cut_short_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    save_file(TENSORS, path)
    full = path.stat().st_size
    os.truncate(path, full - 10)
    with pytest.raises(InvalidConfig, match=f"cut short: {full - 10} bytes; valid: {full} bytes"):
        CheckpointIndex.open(tmp_path)


def test_every_possible_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    save_file(TENSORS, path)
    for size in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(InvalidConfig, match="cut short"):
            CheckpointIndex.open(tmp_path)


def test_a_file_with_bytes_left_over_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    save_file(TENSORS, path)
    with path.open("ab") as file:
        file.write(b"xyz")
    with pytest.raises(InvalidConfig, match="3 too many"):
        CheckpointIndex.open(tmp_path)


def test_a_file_cut_after_it_was_indexed_is_noticed_when_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    write_raw(path, {"a": entry(0, 16, [4])}, bytes(16))
    index = CheckpointIndex.open(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    assert len(index.read("a", 0, 3)) == 12
    with pytest.raises(InvalidConfig, match="cut short"):
        index.read("a")
    path.unlink()
    with pytest.raises(InvalidConfig, match="readable"):
        index.read("a")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "type list"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        ({"a": 3}, "entry of type int"),
        ({"a": {}}, "dtype None"),
        ({"a": entry(0, 4, [1], "F33")}, "dtype 'F33'"),
        ({"a": entry(0, 4, [-1])}, "shape"),
        ({"a": entry(0, 4, [True])}, "shape"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "data_offsets"),
        ({"a": entry(4, 0, [1])}, "bytes for a"),
        ({"a": entry(0, 8, [1])}, "8 bytes for a"),
        ({"a": entry(0, 4, [1 << 40, 1 << 40])}, "bytes for a"),
        ({"a": entry(4, 8, [1])}, "begins at byte"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, "begins at byte"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: object, found: str) -> None:
    write_raw(tmp_path / SINGLE_NAME, header, bytes(8))
    with pytest.raises(InvalidConfig, match=found):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001])
def test_a_header_of_absurd_length_is_not_read(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / SINGLE_NAME, {}, length=length)
    with pytest.raises(InvalidConfig, match="at most 100000000 bytes"):
        CheckpointIndex.open(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_file_is_indexed_whole_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / SINGLE_NAME
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        index = CheckpointIndex.open(tmp_path)
    except InvalidConfig:
        return
    for name in index:
        assert len(index.read(name)) == index[name].nbytes
