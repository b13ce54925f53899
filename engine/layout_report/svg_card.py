"""One GPU as a card: its place, what it holds of layers, heads and experts, and where its memory goes."""

from __future__ import annotations

from drumline.engine.layout_report.memory import in_bytes, inclusive
from drumline.engine.layout_report.ranks import RankReport
from drumline.engine.layout_report.report import LayoutReport
from drumline.engine.layout_report.svg_canvas import (
    ALARM,
    FAINT,
    FRAME,
    INK,
    MUTED,
    PAPER,
    TIMES,
    Canvas,
    fitted,
    ranges,
)
from drumline.engine.layout_report.table import experts_cell

WIDTH = 232
_PAD = 12
_ROW = 17
_LABEL, _STRIP = 46, 70
KIND_COLORS = {
    "attention": "#3f6fb5",
    "mlp": "#2a9d8f",
    "experts": "#f0a04b",
    "shared_experts": "#d9622b",
    "router": "#9b6bd3",
    "embedding": "#7cc0d8",
    "head": "#4fa3c7",
    "norm": "#9aa5b1",
}
KV_COLOR, RESERVED_COLOR = "#b9e3c0", "#eef1f4"
STAGE_COLORS = ("#4c6faf", "#c8742b", "#3d8f5a", "#9467b5", "#b8434e", "#3a8f95", "#a88b1e", "#80664f")


def stage_color(stage: int) -> str:
    """The colour of a pipeline stage, the same in every engine replica."""
    return STAGE_COLORS[stage % len(STAGE_COLORS)]


def card_rows(report: LayoutReport) -> list[str]:
    """The rows that the cards of this report have."""
    rows = ["layers", "heads", "KV"]
    if any(one.mlp[1] > one.mlp[0] for one in report.ranks):
        rows.append("MLP")
    if report.model.num_experts:
        rows.append("experts")
    return rows


def card_height(report: LayoutReport) -> float:
    """Pixels, the same for every card of a picture."""
    return 34 + _ROW * len(card_rows(report)) + 44


def memory_scale(report: LayoutReport) -> int:
    """Bytes that the full width of a memory bar stands for."""
    most = max(one.total_weight_bytes for one in report.ranks)
    return max(most, report.config.gpu_memory_bytes or 0)


def draw_card(canvas: Canvas, report: LayoutReport, one: RankReport, x: float, y: float) -> None:
    """The card of a rank, ``WIDTH`` by :func:`card_height`, with its corner at (x, y)."""
    height = card_height(report)
    canvas.open_group("rank", _hover(report, one))
    canvas.rect(x, y, WIDTH, height, PAPER, stroke=FRAME, radius=8)
    canvas.rect(x, y + 8, 4, height - 16, stage_color(one.pp_rank), radius=2)
    canvas.text(x + _PAD, y + 21, f"rank {one.rank}", 14, bold=True)
    place = f"dp {one.dp_rank} · pp {one.pp_rank} · tp {one.tp_rank}"
    if report.config.enable_expert_parallel:
        place += f" · ep {one.ep_rank}"
    canvas.text(x + WIDTH - _PAD, y + 21, place, 10.5, fill=MUTED, anchor="end")
    top = y + 34
    for name in card_rows(report):
        _row(canvas, report, one, name, x + _PAD, top)
        top += _ROW
    _memory(canvas, report, one, x + _PAD, top + 6)
    canvas.close_group()


def _hover(report: LayoutReport, one: RankReport) -> str:
    parts = [f"rank {one.rank}: layers {inclusive(one.layers)}"]
    if one.experts:
        parts.append(f"experts per layer {experts_cell(report, one)}")
    parts += [f"{kind.replace('_', ' ')} {in_bytes(size)}" for kind, size in one.weight_bytes.items()]
    return ", ".join(parts)


def _row(canvas: Canvas, report: LayoutReport, one: RankReport, name: str, x: float, y: float) -> None:
    total, ids, color, value = _contents(report, one, name)
    canvas.text(x, y + 10, name, 10.5, fill=MUTED)
    left = x + _LABEL
    canvas.rect(left, y + 2, _STRIP, 9, FAINT, radius=2)
    unit = _STRIP / max(total, 1)
    cells = "".join(
        f"M{left + a * unit:.1f} {y + 2:.1f}h{max((b - a) * unit, 0.6):.1f}v9H{left + a * unit:.1f}z"
        for a, b in ids
        if b > a
    )
    if cells:
        canvas.path(cells, fill=color)
    room = WIDTH - 2 * _PAD - _LABEL - _STRIP - 6
    canvas.text(x + WIDTH - 2 * _PAD, y + 10, fitted(value, 10.5, room), 10.5, anchor="end")


def _contents(report: LayoutReport, one: RankReport, name: str) -> tuple[int, list[tuple[int, int]], str, str]:
    """Of a row: how many there are in all, the runs held, their colour, and what they are in words."""
    model = report.model
    if name == "layers":
        return model.num_layers, [one.layers], stage_color(one.pp_rank), f"{_dash(one.layers)} of {model.num_layers}"
    if name == "heads":
        return model.num_heads, [one.q_heads], KIND_COLORS["attention"], f"{_dash(one.q_heads)} of {model.num_heads}"
    if name == "KV":
        copies = report.config.attention_tensor_parallel_size // model.num_kv_heads
        times = f" {TIMES}{copies}" if one.kv_replicated else ""
        value = "latent" if model.latent_attention else f"{_dash(one.kv_heads)} of {model.num_kv_heads}"
        return model.num_kv_heads, [one.kv_heads], "#6b9a3f", value + times
    if name == "MLP":
        share = "none here" if one.mlp[0] == one.mlp[1] else _dash(one.mlp)
        return model.intermediate_size, [one.mlp], KIND_COLORS["mlp"], share
    if not one.experts:
        return model.num_experts, [], KIND_COLORS["experts"], "none here"
    if not report.config.enable_expert_parallel:
        width = one.expert_mlp[1] - one.expert_mlp[0]
        value = f"1/{model.moe_intermediate_size // width} of each" if width < model.moe_intermediate_size else "all"
        return model.moe_intermediate_size, [one.expert_mlp], KIND_COLORS["experts"], value
    ids = next(iter(one.experts.values()))
    return model.num_experts, _runs(ids), KIND_COLORS["experts"], ranges(experts_cell(report, one))


def _dash(span: tuple[int, int]) -> str:
    return ranges(inclusive(span))


def _runs(ids: tuple[int, ...]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for one in ids:
        if runs and runs[-1][1] == one:
            runs[-1] = (runs[-1][0], one + 1)
        else:
            runs.append((one, one + 1))
    return runs


def _memory(canvas: Canvas, report: LayoutReport, one: RankReport, x: float, y: float) -> None:
    width, scale, memory = WIDTH - 2 * _PAD, memory_scale(report), report.config.gpu_memory_bytes
    canvas.rect(x, y, width, 12, FAINT, radius=2)
    left = x
    for kind in KIND_COLORS:
        part = one.weight_bytes.get(kind, 0) / scale * width
        if part >= 0.3:
            canvas.rect(left, y, part, 12, KIND_COLORS[kind])
        left += part
    caption = f"{in_bytes(one.total_weight_bytes)} weights"
    canvas.text(x, y + 26, caption, 10.5, fill=INK)
    if memory is None or one.kv_bytes_free is None:
        canvas.text(x + width, y + 26, f"KV {one.kv_bytes_per_token:,} B/token", 10.5, fill=MUTED, anchor="end")
        return
    end = x + memory / scale * width
    if one.kv_bytes_free > 0:
        room = one.kv_bytes_free / scale * width
        canvas.rect(left, y, room, 12, KV_COLOR)
        said = f"KV {in_bytes(one.kv_bytes_free)} · {_thousands(one.kv_tokens or 0)} tok"
        canvas.text(x + width, y + 26, said, 10.5, fill="#2f6b3a", anchor="end")
    else:
        canvas.path(f"M{end:.1f} {y - 3:.1f}v18", stroke=ALARM, width=2)
        canvas.text(x + width, y + 26, f"{in_bytes(-one.kv_bytes_free)} too big", 10.5, fill=ALARM, anchor="end")


def _thousands(number: int) -> str:
    if number >= 10**6:
        return f"{number / 10**6:.1f}M"
    return f"{number / 10**3:.0f}k" if number >= 10**4 else str(number)
