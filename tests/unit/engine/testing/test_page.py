"""docs/fault-injection.md names everything that can be done, and its scenario is one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from drumline.engine.testing import FaultyEngine, Scenario, ScheduledFault
from drumline.engine.testing.scenario import MESSAGE_KINDS, OTHER_KINDS, POINTS, RANK_KINDS

PAGE = (Path(__file__).resolve().parents[4] / "docs/fault-injection.md").read_text(encoding="utf-8")
METHODS = [name for name, _ in inspect.getmembers(FaultyEngine, inspect.iscoroutinefunction) if name[0] != "_"]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"close"}))
def test_every_method_is_on_the_page(name: str) -> None:
    assert re.search(rf"(`|faulty\.){name}[`(]", PAGE)


@pytest.mark.parametrize("name", sorted({*RANK_KINDS, *MESSAGE_KINDS, *OTHER_KINDS, *POINTS} - {"now"}))
def test_every_kind_and_point_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_the_scenario_on_the_page_is_one() -> None:
    start = PAGE.rindex("Scenario(", 0, PAGE.index('"two at once"'))
    source = PAGE[start : PAGE.index("\n)\n", start) + 2]
    scenario = eval(source, {"Scenario": Scenario, "ScheduledFault": ScheduledFault})
    assert [fault.kind for fault in scenario.faults] == ["kill", "stop", "coordinator"]
