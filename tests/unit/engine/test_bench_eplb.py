"""``drumline bench eplb``: what it prints and writes is what others count from its placements and the loads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from drumline.engine.bench.eplb import EplbSetup
from drumline.engine.bench.eplb_loads import SYNTHETIC, synthetic_loads
from drumline.engine.cli import main
from drumline.protocol.errors import InvalidConfig

LOADS = np.random.default_rng(7).lognormal(0.0, 1.0, (3, 2, 8)).round(3) * 100
SIZES = ["--slots", "10", "--ranks", "3", "--nodes", "2", "--max-moved", "1"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "eplb", *arguments])


def saved(folder: Path, **arrays: Any) -> str:
    path = folder / "loads.npz"
    np.savez(path, **arrays)
    return str(path)


def balancedness(load: Any, placement: Any, counts: list[int]) -> float:
    """As its definition says, one slot after the other; no code of drumline's."""
    layers = []
    for tokens, experts in zip(load, placement, strict=True):
        share = [tokens[e] / list(experts).count(e) for e in experts]
        bounds = np.cumsum([0, *counts])
        ranks = [sum(share[first:end]) for first, end in pairwise(bounds)]
        layers.append(np.mean(ranks) / max(ranks))
    return float(np.mean(layers))


def test_figures_are_those_of_the_placements_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    loads = saved(tmp_path, tokens=LOADS, other=np.ones(3))
    done = bench("--loads", loads, "--key", "tokens", *SIZES, "--placements-out", str(out), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    placements = np.load(out)["physical_to_logical"]
    assert (placements.shape, placements.dtype) == ((3, 2, 10), np.int32)
    assert (report["times"], report["layers"], report["experts"], report["setup"]["slots"]) == (3, 2, 8, 10)
    standing = start = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 2)
    for t, plan in enumerate(report["plans"]):
        assert plan["t"] == t
        assert plan["slots_moved"] == np.count_nonzero(placements[t] != standing)
        expected = {
            "balancedness_start": balancedness(LOADS[t], start, [4, 3, 3]),
            "balancedness_before": balancedness(LOADS[t], standing, [4, 3, 3]),
            "balancedness": balancedness(LOADS[t], placements[t], [4, 3, 3]),
        }
        if t < 2:
            expected["balancedness_next"] = balancedness(LOADS[t + 1], placements[t], [4, 3, 3])
        assert {name: plan[name] for name in expected} == pytest.approx(expected, abs=1e-9)
        assert plan["solve_ms"] > 0
        assert plan["reason"]
        standing = placements[t]
    assert report["plans"][-1]["balancedness_next"] is None
    assert report["plans"][0]["balancedness"] > report["plans"][0]["balancedness_before"]


def test_a_load_without_time_is_one_plan_and_its_key_need_not_be_said(tmp_path: Path) -> None:
    done = bench("--loads", saved(tmp_path, whatever=LOADS[0].astype(np.float32)), *SIZES, "--json")
    assert done.exit_code == 0, done.output
    assert [plan["t"] for plan in json.loads(done.stdout)["plans"]] == [0]


def test_a_table_for_people_names_the_policy_and_what_was_moved() -> None:
    done = bench("--synthetic", "noise", "--layers", "2", "--experts", "8", "--times", "2", *SIZES)
    assert done.exit_code == 0, done.output
    assert "incremental" in done.stdout
    assert "median solve" in done.stdout


def test_a_larger_expert_is_more_bytes(tmp_path: Path) -> None:
    loads = saved(tmp_path, tokens=LOADS[0])
    small, large = (
        json.loads(bench("--loads", loads, *SIZES, "--expert-bytes", size, "--json").stdout)["plans"][0]["bytes_moved"]
        for size in ("1", "3KiB")
    )
    assert large == 3072 * small > 0


@pytest.mark.parametrize(
    ("arrays", "arguments", "said"),
    [
        ({"x": LOADS}, ["--key", "y"], "loads: found no array 'y'"),
        ({"x": LOADS, "y": LOADS}, [], "2 arrays (x, y)"),
        ({"x": LOADS[0, 0]}, [], "shape (8,)"),
        ({"x": -LOADS}, [], "valid: finite numbers from 0"),
        ({"x": np.where(LOADS > 50, np.nan, LOADS)}, [], "nan at"),
        ({"x": np.array([["many", "few"]])}, [], "valid: an array of whole or floating-point numbers"),
        ({"x": LOADS}, ["--slots", "7"], "slots: found 7 for 8 experts on 3 ranks; valid: 8 to 24"),
        ({"x": LOADS}, ["--slots", "25"], "none twice on a rank"),
        ({"x": LOADS}, ["--ranks", "11"], "ranks: found 11 with 10 slots"),
        ({"x": LOADS}, ["--nodes", "4"], "nodes: found 4 for 3 ranks"),
        ({"x": LOADS}, ["--max-moved", "nan"], "max_moved: found nan"),
        ({"x": LOADS}, ["--expert-bytes", "much"], "expert_bytes: found much"),
    ],
)
def test_what_cannot_be_planned_for_is_one_typed_line(
    tmp_path: Path, arrays: dict[str, Any], arguments: list[str], said: str
) -> None:
    done = bench("--loads", saved(tmp_path, **arrays), *SIZES, *arguments, "--json")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("drumline: InvalidConfig: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_policy_that_does_not_take_the_sizes_says_why(tmp_path: Path) -> None:
    done = bench("--loads", saved(tmp_path, x=LOADS), *SIZES, "--policy", "global", "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--loads", "a.npz", "--synthetic", "zipf"],
        ["--loads", "a.npz", "--seed", "1"],
        ["--synthetic", "zipf", "--key", "x"],
        ["--synthetic", "lottery"],
        ["--synthetic", "zipf", "--policy", "astrology"],
        ["--synthetic", "zipf", "--ranks", "0"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str]) -> None:
    assert bench(*SIZES, *arguments).exit_code == 2


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none" / "out.npz")
    done = bench("--loads", str(tmp_path / "not there either.npz"), *SIZES, "--placements-out", nowhere)
    assert done.exit_code == 1
    assert "no such folder" in done.stderr


# -------------------------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_synthetic_loads_are_counts_and_the_same_again(kind: str) -> None:
    loads = synthetic_loads(kind, 3, 4, 16, seed=5)
    assert loads.shape == (3, 4, 16)
    assert (loads >= 0).all()
    assert (loads == np.rint(loads)).all()
    assert (loads == synthetic_loads(kind, 3, 4, 16, seed=5)).all()
    assert (loads != synthetic_loads(kind, 3, 4, 16, seed=6)).any()
    assert loads.mean() == pytest.approx(4096, rel=0.4)


def test_loads_are_as_skewed_and_as_restless_as_they_say() -> None:
    lognormal, zipf, drift, noise = (synthetic_loads(kind, 3, 40, 256) for kind in SYNTHETIC)
    assert np.log(lognormal[0]).std() == pytest.approx(1.0, abs=0.05)
    ranked = np.sort(zipf[0], axis=1)[:, ::-1].mean(axis=0)
    assert ranked[0] / ranked[9] == pytest.approx(10**1.2, rel=0.05)
    assert np.abs(noise[1] / noise[0] - 1).mean() == pytest.approx(0.05 * 2 / np.sqrt(np.pi), rel=0.05)
    changed = np.abs(drift[1] - drift[0]).sum() / 2 / drift[0].sum()
    assert 0.1 < changed < 0.3  # 30 % goes over, some of it to experts that had it


def test_loads_of_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="at most"):
        synthetic_loads("noise", 10_000, 1_000, 1_000)
    with pytest.raises(InvalidConfig, match="one of lognormal"):
        synthetic_loads("lottery", 1, 1, 1)


def test_ranks_nodes_and_slots_are_shared_out_in_order() -> None:
    setup = EplbSetup(slots=11, ranks=4, nodes=3)
    assert setup.slot_rank().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert setup.node_of_rank().tolist() == [0, 0, 1, 2]
    assert setup.start(1, 8).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]]
