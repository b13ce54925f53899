"""A picture of a world: a block per engine replica, in it a row per pipeline stage, in that a card per GPU."""

from __future__ import annotations

import math

from drumline.engine.layout_report import svg_card
from drumline.engine.layout_report.memory import inclusive, listed
from drumline.engine.layout_report.report import LayoutReport
from drumline.engine.layout_report.svg_canvas import (
    FRAME,
    GROUND,
    INK,
    MUTED,
    TIMES,
    Canvas,
    fitted,
    ranges,
    text_width,
    wrapped,
)
from drumline.engine.layout_report.svg_legend import draw_legend
from drumline.engine.layout_report.table import memory_line, title

_MARGIN, _GAP, _GUTTER = 28, 12, 112
_PER_LINE = 8
"""Cards of a stage side by side; a wider stage continues on the next line."""
_STAGES_PER_COLUMN = 8
_NARROWEST, _WIDEST = 660, 2400
_ASPECT = 1.5
_IDLE_WIDTH, _IDLE_HEIGHT, _IDLE_SHOWN = 112, 46, 64
"""Idle GPUs beyond so many are in the heading alone."""


def svg_picture(report: LayoutReport) -> str:
    """The report as an SVG document, light, with every rank in it and every text escaped."""
    blocks = _Blocks(report)
    width = max(blocks.width, _NARROWEST) + 2 * _MARGIN
    canvas = Canvas()
    y = _heading(canvas, report, width)
    y = blocks.draw(canvas, _MARGIN, y) + 8
    if report.idle_gpus:
        y = _idle(canvas, report, y, max(blocks.width, 0.9 * _NARROWEST))
    y = draw_legend(canvas, report, _MARGIN, y + 8, width - 2 * _MARGIN)
    return canvas.document(width, y + _MARGIN, title(report))


def _heading(canvas: Canvas, report: LayoutReport, width: float) -> float:
    room = width - 2 * _MARGIN
    name, _, rest = title(report).partition(": ")
    canvas.text(_MARGIN, 46, fitted(name, 24, room, bold=True), 24, bold=True)
    canvas.text(_MARGIN, 68, fitted(rest.replace(" x ", f" {TIMES} "), 14, room), 14, fill=MUTED)
    y = 68.0
    for line in wrapped(memory_line(report) if all(one.fits for one in report.ranks) else "", 12, room):
        y += 18
        canvas.text(_MARGIN, y, line, 12, fill=MUTED)
    if report.suggestion and not report.idle_gpus:
        for line in wrapped(report.suggestion, 12, room):
            y += 18
            canvas.text(_MARGIN, y, line, 12)
    return y + 20


class _Blocks:
    """Where everything stands. Sizes are pixels."""

    def __init__(self, report: LayoutReport) -> None:
        config = report.config
        self.report = report
        self.tp, self.pp, self.dp = (
            config.tensor_parallel_size,
            config.pipeline_parallel_size,
            config.data_parallel_size,
        )
        self.split = config.attention_data_parallel_size > 1
        self.pitch = svg_card.card_height(report) + _GAP + (20 if self.split else 0)
        self.per_line = min(self.tp, _PER_LINE)
        lines = math.ceil(self.tp / self.per_line)
        self.stage_height = lines * self.pitch + 6
        self.stage_width = _GUTTER + self.per_line * (svg_card.WIDTH + _GAP)
        self.columns = math.ceil(self.pp / _STAGES_PER_COLUMN)
        self.rows = math.ceil(self.pp / self.columns)
        self.block_width = self.columns * self.stage_width + 8
        self.block_height = 38 + self.rows * self.stage_height
        self.across = self._across()
        self.width = self.across * (self.block_width + _GAP) - _GAP

    def _across(self) -> int:
        """How many blocks stand side by side: what comes closest to a page."""

        def distance(across: int) -> float:
            width, height = across * self.block_width, math.ceil(self.dp / across) * self.block_height
            return abs(math.log(width / height / _ASPECT))

        fitting = [n for n in range(1, self.dp + 1) if n * self.block_width <= _WIDEST or n == 1]
        return min(fitting, key=distance)

    def draw(self, canvas: Canvas, x: float, y: float) -> float:
        """All blocks from (x, y) on; returns where they end."""
        for dp_rank in range(self.dp):
            row, column = divmod(dp_rank, self.across)
            left = x + column * (self.block_width + _GAP)
            self._block(canvas, dp_rank, left, y + row * (self.block_height + _GAP))
        return y + math.ceil(self.dp / self.across) * (self.block_height + _GAP)

    def _block(self, canvas: Canvas, dp_rank: int, x: float, y: float) -> None:
        canvas.rect(x, y, self.block_width, self.block_height, GROUND, stroke=FRAME, radius=12)
        ranks = [one.rank for one in self.report.ranks if one.dp_rank == dp_rank]
        name = f"engine replica {dp_rank}"
        canvas.text(x + 16, y + 24, name, 13, bold=True)
        numbers = f"ranks {ranges(listed(tuple(ranks)))}" if len(ranks) > 1 else f"rank {ranks[0]}"
        canvas.text(x + 24 + text_width(name, 13, bold=True), y + 24, numbers, 12, fill=MUTED)
        for stage in range(self.pp):
            column, row = divmod(stage, self.rows)
            top = y + 38 + row * self.stage_height
            self._stage(canvas, dp_rank, stage, x + column * self.stage_width, top)

    def _stage(self, canvas: Canvas, dp_rank: int, stage: int, x: float, y: float) -> None:
        members = [one for one in self.report.ranks if one.dp_rank == dp_rank and one.pp_rank == stage]
        first, color = members[0], svg_card.stage_color(stage)
        height = self.stage_height - _GAP - 6
        canvas.path(f"M{x + _GUTTER - 8:.1f} {y + 2:.1f}h-6v{height - 4:.1f}h6", stroke=color, width=2)
        word = "layers" if first.layers[1] - first.layers[0] > 1 else "layer"
        lines = [f"{word} {ranges(inclusive(first.layers))}"]
        lines += ["embedding"] if first.embedding else []
        lines += ["output head"] if first.head else []
        canvas.text(x + 16, y + 20, f"stage {stage}" if self.pp > 1 else "all layers", 13, fill=color, bold=True)
        for number, line in enumerate(lines):
            canvas.text(x + 16, y + 38 + 15 * number, line, 11, fill=MUTED)
        for place, one in enumerate(members):
            row, column = divmod(place, self.per_line)
            left = x + _GUTTER + column * (svg_card.WIDTH + _GAP)
            top = y + row * self.pitch
            if self.split:
                self._attention_replica(canvas, one.attn_tp_rank, one.replica, column, left, top)
                top += 16
            svg_card.draw_card(canvas, self.report, one, left, top)

    def _attention_replica(
        self, canvas: Canvas, place: int, replica: int, column: int, left: float, top: float
    ) -> None:
        """A bracket over the cards of one attention replica that stand on one line."""
        if place and column:
            return
        width = self.report.config.attention_tensor_parallel_size - place
        cards = min(width, self.per_line - column)
        right = left + cards * (svg_card.WIDTH + _GAP) - _GAP
        canvas.path(f"M{left + 2:.1f} {top + 12:.1f}v-5H{right - 2:.1f}v5", stroke=INK, width=1)
        label = f"attention replica {replica}"
        middle, half = (left + right) / 2, text_width(label, 10.5) / 2 + 4
        canvas.rect(middle - half, top, 2 * half, 13, GROUND)
        canvas.text(middle, top + 10.5, label, 10.5, anchor="middle")


def _idle(canvas: Canvas, report: LayoutReport, y: float, width: float) -> float:
    """Grey cards for GPUs without a rank, and what would use them; returns where they end."""
    room = width - 32
    lines = wrapped(report.suggestion or "", 12, room)
    per_line = max(int((room + _GAP) // (_IDLE_WIDTH + _GAP)), 1)
    shown = report.idle_gpu_ids[:_IDLE_SHOWN]
    rows = math.ceil(len(shown) / per_line)
    height = 48 + rows * (_IDLE_HEIGHT + _GAP) + len(lines) * 17
    canvas.rect(_MARGIN, y, width, height, "#fbfbfc", stroke="#c3cad3", radius=12, dashed=True)
    name = f"idle: GPU {ranges(listed(report.idle_gpu_ids))}"
    canvas.text(_MARGIN + 16, y + 24, name, 13, fill=MUTED, bold=True)
    for place, gpu in enumerate(shown):
        row, column = divmod(place, per_line)
        left, top = _MARGIN + 16 + column * (_IDLE_WIDTH + _GAP), y + 38 + row * (_IDLE_HEIGHT + _GAP)
        canvas.open_group("idle", f"GPU {gpu} has no rank")
        canvas.rect(left, top, _IDLE_WIDTH, _IDLE_HEIGHT, "#eceff2", stroke="#c9d0d8", radius=8)
        canvas.text(left + _IDLE_WIDTH / 2, top + 28, f"GPU {gpu} idle", 12, fill="#87919c", anchor="middle")
        canvas.close_group()
    top = y + 38 + rows * (_IDLE_HEIGHT + _GAP)
    for number, line in enumerate(lines):
        canvas.text(_MARGIN + 16, top + 12 + 17 * number, line, 12)
    return y + height + _GAP
