"""The report of a run, as people read it, and what it is called."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from drumline.engine.commands.chaos_report import show_report
from drumline.engine.testing.census import Census, Holding
from drumline.engine.testing.chaos import ChaosReport, FaultCount
from drumline.engine.testing.recovery import Spread

MIB = 1 << 20
REPORT = ChaosReport(
    model="demo",
    ranks=2,
    seed=3,
    seconds=90.0,
    streams=4,
    requests=40,
    tokens=4000,
    lost=0,
    duplicated=0,
    wrong=0,
    ties=1,
    faults={"kill": FaultCount(5, 1), "slow": FaultCount(2)},
    recovery={"kill": Spread(20, 0.25, 0.75, 0.875)},
    regroup=Spread(5, 0.125, 0.25, 0.25),
    join=Spread(0, 0.0, 0.0, 0.0),
    events={},
    at_start=Census({"app": Holding(1, 50 * MIB, 5, 20, 3)}, 0),
    at_end=Census({"app": Holding(1, 52 * MIB, 5, 21, 3), "ranks": Holding(2, 400 * MIB, 8, 40, 4)}, 2),
    state_at_end="ready",
    journal_at_end="on",
    failures=[],
    not_seen=["kill of rank 1 at joining: it did not come there"],
)


def shown(report: ChaosReport) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    show_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_every_figure_is_in_the_report() -> None:
    lines = shown(REPORT)
    assert lines[0] == "demo on 2 ranks, 4 streams, seed 3: 7 faults in 1.5 minutes"
    assert "requests 40, tokens 4000; lost 0, repeated 0, wrong 0, ties 1; at the end ready, journal on" in lines
    for line in (
        "kill 5 1 20 0.250 0.750 0.875",
        "slow 2 0",
        "regroup 5 0.125 0.250 0.250",
        "app 1 > 1 50 > 52 5 > 5 20 > 21 3 > 3",
        "ranks 0 > 2 0 > 400 0 > 8 0 > 40 0 > 4",
        "total 1 > 3 50 > 452 5 > 13 20 > 61 3 > 7",
        "/dev/shm 0 > 2",
        "faults that were not seen to happen, 1:",
        "kill of rank 1 at joining: it did not come there",
    ):
        assert line in lines
    assert not any(line.startswith(("join", "failures")) for line in lines)


@pytest.mark.parametrize(
    ("changed", "clean"),
    [
        ({}, True),
        ({"lost": 1}, False),
        ({"duplicated": 1}, False),
        ({"wrong": 1}, False),
        ({"state_at_end": "x"}, False),
    ],
)
def test_a_run_is_clean_when_nothing_is_missing_and_the_engine_whole(changed: dict[str, object], clean: bool) -> None:
    report = msgspec.structs.replace(REPORT, **changed, failures=["r: it stopped"] if changed else [])
    assert report.clean is clean
    assert any(line.startswith("failures") for line in shown(report)) is not clean
