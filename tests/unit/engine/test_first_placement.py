"""The placement that an engine starts with: by strategy with redundant copies, from a file, or from a recorded load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from drumline.engine.config import EngineConfig, EPLBConfig, ParallelConfig
from drumline.engine.core.balance.measure import balancedness
from drumline.engine.expert_records import LoadRecord, save_load_record, save_placements
from drumline.engine.first_placement import with_own_file
from drumline.engine.resolve import ResolvedConfig, resolve
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32

LAYERS, EXPERTS, REDUNDANT, RANKS = 4, 16, 3, 2
SLOTS = EXPERTS + REDUNDANT
FIRST = np.tile([*range(EXPERTS), 0, 1, 2], (LAYERS, 1)).astype(np.int32)
SWAPPED = np.tile([*range(1, EXPERTS), 0, 1, 2, 3], (LAYERS, 1)).astype(np.int32)


def resolved(init: Path | None = None, **changes: Any) -> ResolvedConfig:
    eplb = EPLBConfig(num_redundant_experts=REDUNDANT, init_placement=None if init is None else str(init))
    parallel = ParallelConfig(data_parallel_size=RANKS, enable_expert_parallel=True, enable_eplb=True, eplb_config=eplb)
    return resolve(EngineConfig("demo", parallel=msgspec.structs.replace(parallel, **changes)))


def started_with(init: Path | None = None) -> I32:
    placement: I32 = resolved(init).placements[0]
    assert placement.dtype == np.int32
    assert placement.flags.c_contiguous
    return placement


def test_without_a_file_copies_of_the_first_experts_follow_all_of_them() -> None:
    np.testing.assert_array_equal(started_with(), FIRST)
    assert slots_per_rank(SLOTS, RANKS) == (10, 9)


def test_ranks_are_told_that_experts_move_and_how_often_to_report() -> None:
    worker = resolved().worker
    assert (worker.enable_eplb, worker.load_interval) == (True, 32)
    off = resolved(enable_eplb=False, eplb_config=EPLBConfig()).worker
    assert (off.enable_eplb, off.load_interval) == (False, 0)


def test_one_rank_has_no_balance_and_says_so() -> None:
    alone = resolved(data_parallel_size=1, eplb_config=EPLBConfig())
    assert not alone.worker.enable_eplb
    assert any("enable_eplb changes nothing" in text for text in alone.warnings)


@pytest.mark.parametrize("shape", ["npz", "time", "json"])
def test_a_placement_in_a_file_is_the_one_to_start_with(tmp_path: Path, shape: str) -> None:
    path = tmp_path / ("p.json" if shape == "json" else "p.npz")
    if shape == "json":
        path.write_text(json.dumps({"physical_to_logical": SWAPPED.tolist()}))
    elif shape == "time":
        save_placements(path, np.stack([FIRST, SWAPPED]))
    else:
        np.savez(path, physical_to_logical=SWAPPED)
    np.testing.assert_array_equal(started_with(path), SWAPPED)


def wrong(expert: int, slot: int) -> I32:
    placement = FIRST.copy()
    placement[2, slot] = expert
    return placement


@pytest.mark.parametrize(
    ("placement", "found", "valid"),
    [
        (FIRST[:, :-1], r"shape \(4, 18\)", r"\(4, 19\): MoE layers, and slots for 16 experts and 3 redundant"),
        (FIRST[:-1], r"shape \(3, 19\)", r"\(4, 19\)"),
        (wrong(16, 16), "expert 16 in slot 16 of MoE layer 2", "0 to 15"),
        (wrong(4, 5), "no slot for expert 5 of MoE layer 2", "one or more"),
        (wrong(12, 18), "two copies of expert 12 of MoE layer 2 on ep rank 1", "slots 10 to 18"),
    ],
)
def test_a_placement_that_the_model_cannot_have_is_refused(
    tmp_path: Path, placement: I32, found: str, valid: str
) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, physical_to_logical=placement)
    with pytest.raises(InvalidConfig, match=f"{found}.*{valid}") as refused:
        resolved(path)
    assert refused.value.field == "init_placement"
    assert str(path) in refused.value.text


def test_what_was_started_with_is_found_again_when_the_users_file_is_gone(tmp_path: Path) -> None:
    path, folder = tmp_path / "p.json", tmp_path / "own"
    folder.mkdir()
    path.write_text(json.dumps({"physical_to_logical": SWAPPED.tolist()}))
    first = resolved(path)
    config = with_own_file(first.config, first.placements[0], str(folder))
    path.unlink()
    np.testing.assert_array_equal(resolve(config).placements[0], SWAPPED)
    assert resolve(config).digest == first.digest
    plain = resolved()
    assert with_own_file(plain.config, plain.placements[0], str(folder)) is plain.config


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"no such file.*none\.npz"):
        resolved(tmp_path / "none.npz")


def saved_load(folder: Path, tokens: np.ndarray[Any, Any]) -> Path:
    path = folder / "load.npz"
    save_load_record(path, LoadRecord(tokens, np.full(len(tokens), 32), FIRST[: tokens.shape[1]]))
    return path


def test_a_recorded_load_is_planned_for(tmp_path: Path) -> None:
    tokens = np.ones((2, LAYERS, EXPERTS))
    tokens[:, :, [3, 5]] = 50.0
    placement = started_with(saved_load(tmp_path, tokens))
    slot_rank = np.repeat([0, 1], [10, 9]).astype(np.int32)
    assert placement.shape == (LAYERS, SLOTS)
    assert balancedness(tokens[0], FIRST, slot_rank).max() < 0.75
    assert balancedness(tokens[0], placement, slot_rank).min() > 0.95
    for row in placement:
        assert np.bincount(row, minlength=EXPERTS).min() == 1
        assert (len(set(row[:10].tolist())), len(set(row[10:].tolist()))) == (10, 9)


def test_a_load_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"tokens of shape \(1, 4, 20\).*\(snapshots, 4, 16\)") as refused:
        resolved(saved_load(tmp_path, np.ones((1, LAYERS, 20))))
    assert refused.value.field == "init_placement"


def test_a_record_cannot_be_kept_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "load.npz"):
        eplb = EPLBConfig(record_path=str(path))
        with pytest.raises(InvalidConfig, match="a folder that exists") as refused:
            resolved(eplb_config=eplb)
        assert refused.value.field == "record_path"
