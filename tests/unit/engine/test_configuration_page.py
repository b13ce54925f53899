"""docs/configuration.md lists every setting, and everything that is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drumline.engine.config import CacheConfig, EngineConfig, EPLBConfig, FaultConfig, ParallelConfig, SchedulerConfig
from drumline.engine.parallel_config import NOT_YET

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
ROWS = {
    name: [cell.strip() for cell in line.split("|")[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
}
SETTINGS = [
    (cls, name)
    for cls in (EngineConfig, ParallelConfig, EPLBConfig, CacheConfig, SchedulerConfig, FaultConfig)
    for name in cls.__struct_fields__
]
REFUSED = {**NOT_YET, **EPLBConfig.not_yet}


@pytest.mark.parametrize(("cls", "name"), SETTINGS, ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_has_a_row_with_its_default(cls: type, name: str) -> None:
    default = getattr(cls("demo") if cls is EngineConfig else cls(), name)
    shown = ROWS[name][1]
    if name != "model" and name not in ("parallel", "cache", "scheduler", "faults", "eplb_config"):
        assert shown == ('""' if default == "" else f"{default:g}" if isinstance(default, float) else str(default))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_in_this_version_has_a_row_that_says_what_to_do(name: str) -> None:
    assert ROWS[name][-1] == REFUSED[name]


def test_the_page_lists_nothing_else() -> None:
    assert set(ROWS) == {name for _, name in SETTINGS} | set(REFUSED)
