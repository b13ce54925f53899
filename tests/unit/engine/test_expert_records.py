"""Load records and placements in files: what was written is read, and what is something else is said."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drumline.engine.expert_records import (
    LoadRecord,
    read_expert_placement,
    read_load_record,
    read_loads,
    save_load_record,
    save_placements,
)
from drumline.protocol.errors import DrumlineError, InvalidConfig

PLACEMENT = np.array([[0, 1, 2, 0], [2, 1, 0, 1]], dtype=np.int32)
RECORD = LoadRecord(np.arange(18.0).reshape(3, 2, 3), np.array([32, 32, 9]), PLACEMENT)


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "file.npz"
    np.savez(path, **arrays)
    return path


def test_a_record_is_read_as_it_was_written_and_replaces_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    path.write_bytes(b"an older one")
    save_load_record(path, RECORD)
    read = read_load_record(path)
    assert read.tokens.tolist() == RECORD.tokens.tolist()
    assert (read.steps.tolist(), read.steps.dtype.name) == ([32, 32, 9], "int64")
    assert (read.physical_to_logical.tolist(), read.physical_to_logical.dtype.name) == (PLACEMENT.tolist(), "int32")
    assert read.num_experts == 3
    assert list(tmp_path.iterdir()) == [path]


def test_what_an_engine_starts_from_is_a_record_or_a_placement(tmp_path: Path) -> None:
    record, placements, json = tmp_path / "r.npz", tmp_path / "p.npz", tmp_path / "p.json"
    save_load_record(record, RECORD)
    save_placements(placements, np.stack([PLACEMENT[::-1], PLACEMENT]))
    json.write_text('{"physical_to_logical": [[0, 1, 2, 0], [2, 1, 0, 1]], "more": 1}')
    assert isinstance(read_expert_placement(record), LoadRecord)
    for path in (placements, json, saved(tmp_path, physical_to_logical=PLACEMENT)):
        read = read_expert_placement(path)
        assert isinstance(read, np.ndarray)
        assert (read.tolist(), read.dtype.name) == (PLACEMENT.tolist(), "int32")


def test_loads_of_anybody_get_a_dimension_of_time(tmp_path: Path) -> None:
    one = np.array([[3, 1], [0, 2]], dtype=np.uint16)
    assert read_loads(saved(tmp_path, whatever=one)).tolist() == [one.tolist()]
    assert read_loads(saved(tmp_path, a=one, b=one * 2), "b").tolist() == [(one * 2).tolist()]
    np.save(tmp_path / "plain.npy", one.astype(np.float16))
    assert read_loads(tmp_path / "plain.npy").shape == (1, 2, 2)
    save_load_record(tmp_path / "record.npz", RECORD)
    assert read_loads(tmp_path / "record.npz").tolist() == RECORD.tokens.tolist()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((1, 1, 1, 1)), r"shape \(1, 1, 1, 1\)"),
        (np.ones((0, 4)), r"shape \(0, 4\)"),
        (np.array([[1.0, np.nan]]), r"nan at \(0, 1\)"),
        (np.array([[1.0], [np.inf]]), r"inf at \(1, 0\)"),
        (np.array([[-1, 4]]), r"-1 at \(0, 0\)"),
        (np.array([["a"]]), "<U1"),
        (np.array([[True]]), "bool"),
        (np.array([[1j]]), "complex128"),
    ],
)
def test_loads_that_are_none_are_refused_with_what_was_found(tmp_path: Path, array: Any, said: str) -> None:
    path = saved(tmp_path, x=array)
    with pytest.raises(InvalidConfig, match=said) as refused:
        read_loads(path, "x")
    assert refused.value.field == "loads"
    assert str(path) in refused.value.text


def test_a_key_must_be_there_and_be_given_when_there_are_several(tmp_path: Path) -> None:
    path = saved(tmp_path, a=np.ones((1, 1)), b=np.ones((1, 1)))
    with pytest.raises(InvalidConfig, match=r"no array 'c' in .*valid: one of a, b"):
        read_loads(path, "c")
    with pytest.raises(InvalidConfig, match=r"2 arrays \(a, b\)"):
        read_loads(path)


def test_objects_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    objects = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(objects, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", objects.getvalue() + b"cposix\nsystem\n")
    with pytest.raises(InvalidConfig, match="no numbers but objects"):
        read_loads(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00\xff\xff{", b"plain text"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"valid: an \.npz file of numbers"):
        read_loads(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no such file"):
        read_loads(tmp_path / "none.npz")
    with pytest.raises(InvalidConfig, match="no such file"):
        read_expert_placement(tmp_path / "none.json")
    with pytest.raises(DrumlineError, match="cannot be written"):
        save_placements(tmp_path / "none" / "p.npz", PLACEMENT[None])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": np.array([1, 2])}, "as many as snapshots: 3"),
        ({"steps": np.array([1.0, 2.0, 3.0])}, "float64"),
        ({"physical_to_logical": PLACEMENT[:1]}, "1 layers and tokens of 2"),
        ({"physical_to_logical": PLACEMENT + 1}, "expert 3 .*valid: 0 to 2"),
        ({"physical_to_logical": PLACEMENT - 1}, "expert -1"),
        ({"physical_to_logical": PLACEMENT.astype(float)}, "float64"),
        ({"tokens": RECORD.tokens[0]}, r"shape \(2, 3\)"),
    ],
)
def test_a_record_whose_parts_do_not_agree_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    arrays = {"tokens": RECORD.tokens, "steps": RECORD.steps, "physical_to_logical": PLACEMENT}
    with pytest.raises(InvalidConfig, match=said):
        read_expert_placement(saved(tmp_path, **(arrays | change)))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"physical_to_logical": [[0, 1], [0]]}', '{"physical_to_logical": [[0.5]]}', "{", "[" * 9999]
)
def test_json_that_is_no_placement_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match="init_expert_placement"):
        read_expert_placement(path)
