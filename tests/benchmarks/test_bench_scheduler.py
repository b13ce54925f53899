"""The shape of what ``drumline bench scheduler`` prints. How fast it is depends on the machine: no time is asserted."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from drumline.engine.bench.scheduler import run
from drumline.engine.cli import main

FIGURES = ("total_us", "total_p99_us", "plan_us", "encode_us", "decode_us", "apply_us", "maintain_us", "aligned_p99_us")


def test_json_on_stdout_holds_the_machine_and_one_result_for_each_size() -> None:
    done = CliRunner().invoke(main, ["bench", "scheduler", "--rows", "4", "--rows", "32", "--steps", "20", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "results"}
    assert [(one["replicas"], one["rows"]) for one in report["results"]] == [(1, 4), (1, 32)]
    assert all(one[name] > 0 for one in report["results"] for name in FIGURES)


def test_replicas_run_in_one_lockstep_group() -> None:
    report = run(rows=[8], replicas=3, steps=20)
    assert [(one.replicas, one.rows, one.steps) for one in report.results] == [(3, 8, 20)]
    one = report.results[0]
    assert one.total_us <= one.plan_us + one.encode_us + one.decode_us + one.apply_us + one.total_p99_us


def test_a_plan_of_a_step_in_which_nothing_changes_is_small_whatever_runs() -> None:
    """Only rows that cross into a new block are named: 8 bytes for each, a 16th of the rows in a step."""
    few, many = run(rows=[64, 512], steps=48).results
    assert many.plan_bytes - few.plan_bytes < 1.25 * (512 - 64) / 16 * 8


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--replicas", "0"], ["--steps", "0"]])
def test_sizes_that_cannot_be_are_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["bench", "scheduler", *arguments])
    assert done.exit_code == 2
    assert "range" in done.stderr
