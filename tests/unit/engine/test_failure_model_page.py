"""docs/failure-model.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHORT = {"core/": "unit/core/", "journal/": "unit/engine/journal/"}


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs/failure-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+/test_[a-z_0-9]+\.py)`", page))
    for name in named:
        head, _, rest = name.partition("/")
        assert (ROOT / "tests" / (SHORT.get(f"{head}/", f"{head}/") + rest)).is_file(), name
    assert len(named) > 15


def test_every_fault_of_the_table_names_a_test() -> None:
    page = (ROOT / "docs/failure-model.md").read_text(encoding="utf-8")
    table = page[page.index("| fault |") : page.index("## Detection")].strip().splitlines()[2:]
    assert len(table) > 15
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 4, line
        assert "test_" in cells[3], line
