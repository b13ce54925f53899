"""What colours and brackets of the picture mean, and the groups."""

from __future__ import annotations

from drumline.engine.layout_report.memory import in_bytes, listed
from drumline.engine.layout_report.report import LayoutReport
from drumline.engine.layout_report.svg_canvas import ALARM, MUTED, Canvas, fitted, ranges, text_width
from drumline.engine.layout_report.svg_card import KIND_COLORS, KV_COLOR, RESERVED_COLOR, memory_scale

_MEANINGS = {
    "tp": "the cards of one stage in one block: share every layer of it",
    "pp": "one card of each stage in one block: the way of a token",
    "dp": "the same place in every block",
    "ep": "one stage (one colour) in every block: hold its experts between them",
    "attn_tp": "the cards of one attention replica in one stage: shard its heads",
    "attn_dp": "the same heads, for the other attention replicas of the block",
}
_SHOWN = 6


def draw_legend(canvas: Canvas, report: LayoutReport, x: float, y: float, width: float) -> float:
    """Colours in a line, then a line per kind of group; returns where it ends."""
    y = _colors(canvas, report, x, y + 14, width)
    kinds = [kind for kind in _MEANINGS if kind in report.groups and _worth_saying(report, kind)]
    left = x + 104 + max((text_width(_MEANINGS[kind], 11.5) for kind in kinds), default=0.0)
    for kind in kinds:
        y += 20
        canvas.text(x, y, f"{kind.replace('attn', 'attention').replace('_', ' ')}", 11.5, bold=True)
        canvas.text(x + 96, y, _MEANINGS[kind], 11.5, fill=MUTED)
        groups = report.groups[kind]
        lists = "  ".join(f"[{ranges(listed(group))}]" for group in groups[:_SHOWN])
        lists += f"  and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        canvas.text(left, y, fitted(lists, 11.5, x + width - left), 11.5)
    return y


def _worth_saying(report: LayoutReport, kind: str) -> bool:
    if kind.startswith("attn") and report.config.attention_data_parallel_size == 1:
        return False
    return len(report.groups[kind][0]) > 1


def _colors(canvas: Canvas, report: LayoutReport, x: float, y: float, width: float) -> float:
    held = {kind for one in report.ranks for kind in one.weight_bytes}
    chips = [(color, kind.replace("_", " ")) for kind, color in KIND_COLORS.items() if kind in held]
    memory = report.config.gpu_memory_bytes
    if memory is not None:
        chips.append((KV_COLOR, "left for KV, activations, workspace"))
        if any((one.kv_bytes_free or 0) <= 0 for one in report.ranks):
            chips.append((ALARM, f"end of {in_bytes(memory)}"))
        chips.append((RESERVED_COLOR, f"not used (utilization {report.config.gpu_memory_utilization:g})"))
    lead = f"memory bar of {in_bytes(memory_scale(report))}:"
    canvas.text(x, y, lead, 11.5, fill=MUTED)
    left = x + text_width(lead, 11.5) + 12
    for color, name in chips:
        step = 18 + text_width(name, 11.5) + 14
        if left + step > x + width:
            left, y = x, y + 20
        canvas.rect(left, y - 9.5, 12, 12, color, stroke="#ffffff", radius=2)
        canvas.text(left + 17, y, name, 11.5)
        left += step
    return y
