"""The page of ``drumline bench eplb --report``: pictures, figures, the plans. It loads nothing; texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from statistics import median

import numpy as np

from drumline.engine.bench.eplb import EplbPlan, EplbReport, EplbTrace
from drumline.engine.bench.eplb_charts import F64, bar_chart, heat_map, line_chart, scale
from drumline.engine.bench.eplb_style import STYLE
from drumline.engine.layout_report.memory import counted, in_bytes

MAX_LISTED = 500
_STAGES = {"start": "had nothing been moved", "before": "before the plan of that time", "after": "after it"}
_FIRST_OPEN = 24


def eplb_page(report: EplbReport, trace: EplbTrace) -> str:
    """One HTML document, for light and dark, wide and narrow screens."""
    title = escape(f"Expert balance: {report.source}")
    body = "\n".join((_head(report), _tiles(report), _balance(report), _moved(report), _ranks(trace), _layers(trace)))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n{_listing(report)}\n</main>\n</body>\n</html>\n"
    )


def _head(report: EplbReport) -> str:
    setup = report.setup
    where = f"{counted(setup.ranks, 'rank')} in {counted(setup.nodes, 'node')}"
    rules = f"at most {100 * setup.max_moved:g} % of the slots moved per plan, for a gain of {setup.min_gain:g} or more"
    rules = rules if setup.policy == "incremental" else "no bound on what is moved"
    return (
        f"<h1>Expert balance</h1>\n<p class='lead'>{escape(report.source)}: {counted(report.times, 'time')}, "
        f"{counted(report.layers, 'layer')}, {report.experts:,} experts in {setup.slots:,} slots on {where}. "
        f"Policy <b>{escape(setup.policy)}</b>, {rules}. One plan for each time, from the placement before.</p>"
    )


def _tiles(report: EplbReport) -> str:
    plans, slots = report.plans, report.layers * report.setup.slots
    moved = [one.slots_moved / slots for one in plans]
    tiles = (
        (f"{_mean(one.balancedness for one in plans):.3f}", "balancedness with the plans, on average"),
        (f"{_mean(one.balancedness_start for one in plans):.3f}", "had nothing been moved"),
        (f"{100 * _mean(moved):.1f} %", f"of the slots moved per plan; {100 * max(moved):.1f} % at most"),
        (in_bytes(round(_mean(one.bytes_moved for one in plans))), "between ranks per plan, on average"),
        (f"{median(one.solve_ms for one in plans):.1f} ms", f"to solve, median; {report.machine.cpu}"),
        (f"{plans[-1].single_copy:,}", f"of {report.layers * report.experts:,} experts have one copy at the end"),
    )
    shown = "\n".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    return f'<div class="tiles">\n{shown}\n</div>'


def _balance(report: EplbReport) -> str:
    plans = report.plans
    start, before, after = (
        np.array([getattr(one, name) for one in plans])
        for name in ("balancedness_start", "balancedness_before", "balancedness")
    )
    low = float(np.floor(min(start.min(), before.min(), after.min()) * 10 - 1e-9) / 10)
    chart = line_chart(
        (("start", start), ("before", before), ("after", after)),
        max(low, 0.0),
        1.0,
        [_hint(one) for one in plans],
        "Balancedness over time: at the start's placement, before and after each plan",
    )
    return _figure(
        "Balancedness",
        "Tokens of the mean rank over tokens of the busiest, the mean over layers; 1 is best. The copies of an expert "
        "share its tokens.",
        "".join(f'<span class="key {stage}">{title}</span>' for stage, title in _STAGES.items()),
        chart,
    )


def _moved(report: EplbReport) -> str:
    slots = report.layers * report.setup.slots
    shares = np.array([one.slots_moved / slots for one in report.plans])
    limit = report.setup.max_moved if report.setup.policy == "incremental" else None
    high = max(float(shares.max()) * 1.05, (limit or 0.0) * 1.05, 0.01)
    key = '<span class="key limit">the most that a plan may move</span>' if limit is not None else ""
    hints = [_hint(one) for one in report.plans]
    chart = bar_chart(shares, min(high, 1.0), hints, "Share of the slots moved, for each plan", limit)
    return _figure("Slots moved", "Slots that got another expert, over those of all layers.", key, chart)


def _ranks(trace: EplbTrace) -> str:
    reach = float(np.percentile(np.abs(np.concatenate(list(trace.rank_load.values())) - 1.0), 99))
    reach = min(max(reach, 0.05), 1.0)
    panels = "".join(
        _panel(title, heat_map(values, 1.0 - reach, 1.0 + reach, "d", _rank_hints(values), f"Load of ranks {title}"))
        for title, values in _by_stage(trace.rank_load)
    )
    legend = scale("d", f"{1 - reach:.2f}", f"{1 + reach:.2f} of the mean rank's")
    about = "Tokens of each rank (downwards) at each time (to the right), the mean over layers."
    return _figure("Load of the ranks", about, legend, f'<div class="panels">{panels}</div>')


def _layers(trace: EplbTrace) -> str:
    low = float(min(np.floor(np.concatenate(list(trace.layer_balance.values())).min() * 20) / 20, 0.95))
    panels = "".join(
        _panel(title, heat_map(values, low, 1.0, "s", _layer_hints(values), f"Balancedness of layers {title}"))
        for title, values in _by_stage(trace.layer_balance)
    )
    about = "Balancedness of each MoE layer (downwards) at each time (to the right)."
    return _figure(
        "Balance of the layers", about, scale("s", f"{low:.2f}", "1.00"), f'<div class="panels">{panels}</div>'
    )


def _by_stage(values: dict[str, F64]) -> list[tuple[str, F64]]:
    return [(title, values[stage]) for stage, title in _STAGES.items()]


def _figure(title: str, about: str, legend: str, drawing: str) -> str:
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(about)}</p>\n"
        f'<p class="legend">{legend}</p>\n{drawing}\n</section>'
    )


def _panel(title: str, drawing: str) -> str:
    return f'<div class="panel"><h3>{escape(title)}</h3>{drawing}</div>'


def _hint(one: EplbPlan) -> str:
    moved = f"{one.slots_moved:,} slots moved, {in_bytes(one.bytes_moved)} between ranks"
    return f"t {one.t}: {one.balancedness_before:.4f} to {one.balancedness:.4f}; {moved}; {one.reason}"


def _rank_hints(values: F64) -> list[str]:
    return [f"t {t}: busiest is rank {int(row.argmax())}, {row.max():.2f} of the mean" for t, row in enumerate(values)]


def _layer_hints(values: F64) -> list[str]:
    return [f"t {t}: worst is layer {int(row.argmin())}, {row.min():.3f}" for t, row in enumerate(values)]


def _listing(report: EplbReport) -> str:
    names = (
        "t",
        "before",
        "after",
        "on the next load",
        "slots moved",
        "bytes moved",
        "between nodes",
        "solve",
        "reason",
    )
    left = {"reason"}
    rows = [_cells(one) for one in report.plans[:MAX_LISTED]]
    head = "".join(f"<th{'' if name in left else ' class=n'}>{name}</th>" for name in names)
    body = "\n".join(
        "<tr>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row[:-1]) + f"<td>{escape(row[-1])}</td></tr>"
        for row in rows
    )
    more = f" (the first {MAX_LISTED} of {report.times:,})" if report.times > MAX_LISTED else ""
    shown = " open" if report.times <= _FIRST_OPEN else ""
    return (
        f"<details{shown}>\n<summary>The plans{more}</summary>\n<div class='tables'><table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n</details>"
    )


def _cells(one: EplbPlan) -> list[str]:
    following = "" if one.balancedness_next is None else f"{one.balancedness_next:.4f}"
    return [
        str(one.t),
        f"{one.balancedness_before:.4f}",
        f"{one.balancedness:.4f}",
        following,
        f"{one.slots_moved:,}",
        in_bytes(one.bytes_moved),
        in_bytes(one.cross_node_bytes),
        f"{one.solve_ms:.1f} ms",
        one.reason,
    ]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
