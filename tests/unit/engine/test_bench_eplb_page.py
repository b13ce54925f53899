"""The page of ``drumline bench eplb --report``: whole in itself, and its pictures show what was counted."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner

from drumline.engine.bench.eplb_charts import LEVELS, MAX_COLUMNS, MAX_ROWS, bar_chart, heat_map, line_chart
from drumline.engine.cli import main


class Tags(HTMLParser):
    """Fails when a tag is closed that is not open; collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    loads = folder / "<b>loads & more.npz"
    np.savez(loads, tokens=np.random.default_rng(3).lognormal(0, 1, (5, 3, 8)))
    out = folder / "report.html"
    arguments = ["--loads", str(loads), "--slots", "10", "--ranks", "4", "--report", str(out), "--json"]
    done = CliRunner().invoke(main, ["bench", "eplb", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("{")
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_in_itself(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", page)
    assert {name for name, _ in tags.attributes}.isdisjoint({"src", "href", "onload"})


def test_the_page_is_for_light_dark_and_phones_and_escapes_what_it_did_not_write(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page
    assert "&lt;b&gt;loads &amp; more.npz" in page
    assert "<b>loads" not in page


def test_every_drawing_is_valid_and_has_a_hint_for_each_time(page: str) -> None:
    drawings = [ET.fromstring(found) for found in re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)]
    hints = [sum("t " in (title.text or "") for title in one.iter("title")) for one in drawings]
    # Two charts, two times three heat maps; the two scales beside those have none.
    assert sorted(hints) == [0, 0] + [5] * 8


def test_a_heat_map_draws_every_cell_once_in_its_colour() -> None:
    values = np.array([[0.0, 0.5, 1.0], [0.0, 0.49, 2.0]])
    drawn = heat_map(values, 0.0, 1.0, "s", ["a", "b"], "name")
    found = {int(level): path for level, path in re.findall(r'class="s(\d)" d="([^"]*)"', drawn)}
    assert found == {0: "M0 0h2v1h-2z", 4: "M0 1h2v1h-2z", LEVELS - 1: "M0 2h2v1h-2z"}


def test_long_and_tall_loads_are_drawn_by_means_of_neighbours() -> None:
    values = np.tile(np.linspace(0.0, 1.0, 1000)[:, None], (1, 300))
    drawn = heat_map(values, 0.0, 1.0, "s", [str(t) for t in range(1000)], "name")
    assert f'viewBox="0 0 {MAX_COLUMNS} {MAX_ROWS}"' in drawn
    widths = [int(width) for width in re.findall(r"M\d+ \d+h(\d+)v1", drawn)]
    assert sum(widths) == MAX_COLUMNS * MAX_ROWS


def test_lines_and_bars_stand_where_their_values_are() -> None:
    line = line_chart((("after", np.array([0.5, 1.0])),), 0.5, 1.0, ["a", "b"], "name")
    assert 'd="M0.5 1000L1.5 0"' in line
    bars = bar_chart(np.array([0.1, 0.0]), 0.2, ["a", "b"], "name", limit=0.1)
    assert 'y="500" width="0.7" height="500"' in bars
    assert 'd="M0 500H2"' in bars


def test_charts_of_one_time_and_of_nothing_moved_can_be_drawn() -> None:
    assert "h0" in line_chart((("after", np.array([1.0])),), 0.9, 1.0, ["a"], "name")
    assert "0 %" in bar_chart(np.zeros(1), 0.01, ["a"], "name")
