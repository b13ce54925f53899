"""The shape of what ``drumline bench shuffle`` prints, and how it ends. How fast it is depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from drumline.engine.cli import main
from tests.integration.engine.conftest import mark, runtime_root
from tests.integration.engine.interrupts import interrupt_when_ready

__all__ = ["mark", "runtime_root"]

COMMAND = [sys.executable, "-c", "from drumline.engine.cli import main; main()", "bench", "shuffle"]


def test_json_on_stdout_holds_plans_moves_and_latencies(mark: str) -> None:
    arguments = ["-dp", "2", "--streams", "4", "--seconds", "1", "--window", "0.5", "--window-size", "32", "--json"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["cores"] >= 1
    (one,) = report["results"]
    assert (one["data_parallel_size"], one["ranks"], one["num_redundant_experts"], one["streams"]) == (2, 2, 4, 4)
    assert all(0.0 < one[f"balancedness_{name}"] <= 1.0 for name in ("start", "prose", "turned", "code"))
    assert [plan["traffic"] for plan in one["plans"]].count("code") >= 1
    assert all(plan["slots_moved"] * plan["bytes_moved"] > 0 for plan in one["plans"] if plan["outcome"] == "moved")
    assert one["moving"]["rebalances"] >= 1
    assert one["moving"]["mb_per_s"] > 0
    assert one["latency"]["pairs"] == 1
    assert one["latency"]["p99_moving_ms"] >= one["latency"]["p50_moving_ms"] > 0
    assert "ready in" in done.stderr


def test_an_interrupt_ends_everything_that_was_started(mark: str) -> None:
    assert interrupt_when_ready([*COMMAND, "-dp", "2"]) == 130


@pytest.mark.parametrize(
    "arguments", [["-dp", "0"], ["--streams", "0"], ["--seconds", "0"], ["--policy", "best"], ["3"]]
)
def test_sizes_that_cannot_be_are_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, ["bench", "shuffle", *arguments])
    assert done.exit_code == 2
