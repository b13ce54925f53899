"""The picture and the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from drumline.engine.layout_report.explain import explain
from drumline.engine.layout_report.html import html_page
from drumline.engine.layout_report.report import report
from drumline.engine.layout_report.svg import svg_picture
from drumline.engine.layout_report.svg_canvas import fitted, text_width, wrapped
from drumline.protocol.modelspec import ModelSpec
from tests.unit.specs import DENSE

from .worlds import LATENT, MOE, WORLD, question, report_on

SVG = "{http://www.w3.org/2000/svg}"
DOCS_PICTURE = Path(__file__).parents[3] / "docs" / "layout-deepseek-v3.svg"
SCRIPT = "<script>alert(1)</script>&\"'\x00"

PICTURES: list[tuple[ModelSpec | str, dict[str, Any]]] = [
    (DENSE, {}),
    (DENSE, {"tensor_parallel_size": 4, "num_gpus": 40}),
    (DENSE, {"tensor_parallel_size": 8, "enable_dp_attention": True, "data_parallel_size": 8}),
    (DENSE, {"pipeline_parallel_size": 30}),
    (MOE, {**WORLD, "enable_expert_parallel": True, "gpu_memory": 8 << 20}),
    (LATENT, {"tensor_parallel_size": 8, "enable_dp_attention": True, "gpu_memory": 1 << 20}),
    ("deepseek-v3", {"tensor_parallel_size": 16, "data_parallel_size": 4, "gpu_memory": 80 << 30}),
    ("qwen3-235b-a22b", {"data_parallel_size": 64, "enable_expert_parallel": True}),
]


def texts(group: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in group.iter(f"{SVG}text")]


@pytest.mark.parametrize(("model", "options"), PICTURES)
def test_every_rank_and_every_idle_gpu_has_a_card(model: ModelSpec | str, options: dict[str, Any]) -> None:
    made = report_on(model, **options)
    root = ET.fromstring(svg_picture(made))
    cards = [group for group in root.iter(f"{SVG}g") if group.get("class") == "rank"]
    assert [texts(card)[0] for card in cards] == [f"rank {one.rank}" for one in made.ranks]
    idle = [group for group in root.iter(f"{SVG}g") if group.get("class") == "idle"]
    assert [texts(card)[0] for card in idle] == [f"GPU {gpu} idle" for gpu in made.idle_gpu_ids]


@pytest.mark.parametrize(("model", "options"), PICTURES)
def test_cards_overlap_nowhere_and_lie_within_the_picture(model: ModelSpec | str, options: dict[str, Any]) -> None:
    root = ET.fromstring(svg_picture(report_on(model, **options)))
    width, height = (float(root.get(side, "0")) for side in ("width", "height"))
    boxes = []
    for group in root.iter(f"{SVG}g"):
        box = group.find(f"{SVG}rect")
        assert box is not None
        x, y, w, h = (float(box.get(name, "0")) for name in ("x", "y", "width", "height"))
        boxes.append((x, y, x + w, y + h))
    assert all(min(x, y) >= 0 and right <= width and bottom <= height for x, y, right, bottom in boxes)
    for number, (x, y, right, bottom) in enumerate(boxes):
        for left, top, far, low in boxes[number + 1 :]:
            assert right <= left or far <= x or bottom <= top or low <= y


@pytest.mark.parametrize(("model", "options"), PICTURES)
def test_text_stays_within_the_picture(model: ModelSpec | str, options: dict[str, Any]) -> None:
    root = ET.fromstring(svg_picture(report_on(model, **options)))
    width = float(root.get("width", "0"))
    for text in root.iter(f"{SVG}text"):
        x, size = float(text.get("x", "0")), float(text.get("font-size", "0"))
        long = text_width("".join(text.itertext()), size, text.get("font-weight") is not None)
        start = {"start": x, "middle": x - long / 2, "end": x - long}[text.get("text-anchor", "start")]
        assert start >= -1, text.text
        assert start + long <= width + 1, text.text


def test_the_picture_in_the_docs_is_what_is_drawn() -> None:
    """``drumline layout`` with these sizes and --svg docs/layout-deepseek-v3.svg draws it anew."""
    sizes: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 4, "enable_expert_parallel": True}
    made = report_on("deepseek-v3", gpu_memory=192 << 30, max_model_len=32768, **sizes)
    assert DOCS_PICTURE.read_text() == svg_picture(made)


def test_a_weight_bar_is_no_longer_than_the_memory_that_it_shows() -> None:
    root = ET.fromstring(svg_picture(report_on(DENSE, gpu_memory=64 << 20)))
    (card,) = (group for group in root.iter(f"{SVG}g") if group.get("class") == "rank")
    track, *parts = (rect for rect in card.iter(f"{SVG}rect") if rect.get("height") == "12.0")
    assert sum(float(part.get("width", "0")) for part in parts) <= float(track.get("width", "0"))


def test_names_of_models_are_escaped_in_picture_and_page() -> None:
    asked = question(DENSE, name=SCRIPT)
    made = report(asked)
    page = html_page(made, explain(asked, made))
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    picture = svg_picture(made)
    assert "<script" not in picture
    assert "<script>alert(1)</script>&\"'?" in "".join(ET.fromstring(picture).itertext())


class Balance(HTMLParser):
    """Counts the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Opened and closed at once."""


def test_the_page_stands_alone() -> None:
    asked = question(LATENT, **WORLD, gpu_memory=64 << 20)
    made = report(asked)
    page = html_page(made, explain(asked, made))
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=", page)
    for topic in explain(asked, made):
        assert f"<h3>{topic.title}</h3>" in page


def test_text_is_cut_and_wrapped_to_a_width() -> None:
    assert fitted("abc", 10, 100) == "abc"
    assert text_width(fitted("a" * 50, 10, 100), 10) <= 100
    lines = wrapped("one two three " + "x" * 60, 10, 80)
    assert all(text_width(line, 10) <= 80 for line in lines)
    assert lines[0].startswith("one two")
