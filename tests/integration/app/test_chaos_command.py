"""``drumline chaos`` as a process: its report and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.integration.engine.conftest import mark, runtime_root
from tests.integration.engine.interrupts import interrupt_when_ready

__all__ = ["mark", "runtime_root"]

COMMAND = [sys.executable, "-c", "from drumline.engine.cli import main; main()", "chaos"]


def test_a_short_run_loses_nothing_and_says_what_it_did(mark: str) -> None:
    arguments = ["--minutes", "0.1", "--every", "1", "--streams", "4", "--max-tokens", "24", "--seed", "1", "--json"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ranks"], report["streams"], report["seed"]) == (2, 4, 1)
    assert (report["lost"], report["duplicated"], report["wrong"]) == (0, 0, 0)
    assert report["requests"] >= 4
    assert sum(count["happened"] for count in report["faults"].values()) >= 2
    assert report["recovery"]
    assert report["state_at_end"] == "ready"
    assert set(report["at_start"]["roles"]) == set(report["at_end"]["roles"]) >= {"app", "coordinator", "ranks"}
    assert "ready in" in done.stderr


def test_an_interrupt_ends_everything_that_was_started(mark: str) -> None:
    assert interrupt_when_ready([*COMMAND, "--minutes", "5"]) == 130
