"""Charts over time as HTML: labels are text, which keeps its size; the drawing between them is SVG and stretches.

A drawing is as wide as the page lets it be. Colours are classes, whose meaning in light and dark the page's style says.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, TypeAlias

import numpy as np

F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

LEVELS = 9
MAX_COLUMNS, MAX_ROWS = 240, 128
_HEIGHT = 1000


def line_chart(series: Sequence[tuple[str, F64]], low: float, high: float, hints: Sequence[str], name: str) -> str:
    """Lines over time. ``series``: a CSS class and float64 (times,) each; ``low`` and ``high``: the values at bottom
    and top. ``hints``: what is shown where the pointer rests, for each time."""
    times = len(hints)
    shapes = [f'<path class="grid" d="M0 {_y(value, low, high)}H{times}"/>' for value in _ticks(low, high)]
    for css_class, values in series:
        points = [f"{t + 0.5:g} {_y(float(value), low, high)}" for t, value in _thinned(values)]
        shapes.append(f'<path class="line {css_class}" d="M{"L".join(points)}"/>')
        if len(points) <= 60:
            dots = "".join(f"M{point}h0" for point in points)
            shapes.append(f'<path class="dots {css_class}" d="{dots}"/>')
    labels = [(f"{value:.2f}", (high - value) / (high - low)) for value in _ticks(low, high)]
    return _plot("".join(shapes) + _hints(hints), (times, _HEIGHT), labels, times, name)


def bar_chart(values: F64, high: float, hints: Sequence[str], name: str, limit: float | None = None) -> str:
    """A bar for each time, in percent of ``high`` and less. ``limit``: a line across."""
    times = len(values)
    shapes = [f'<path class="grid" d="M0 {_y(value, 0.0, high)}H{times}"/>' for value in _ticks(0.0, high)]
    for t, value in enumerate(values):
        top = _y(float(value), 0.0, high)
        shapes.append(f'<rect class="bar" x="{t + 0.15:g}" y="{top}" width="0.7" height="{_HEIGHT - top}"/>')
    if limit is not None and limit <= high:
        shapes.append(f'<path class="line limit" d="M0 {_y(limit, 0.0, high)}H{times}"/>')
    labels = [(f"{100 * value:.3g} %", (high - value) / high) for value in _ticks(0.0, high)]
    return _plot("".join(shapes) + _hints(hints), (times, _HEIGHT), labels, times, name)


def heat_map(values: F64, low: float, high: float, colors: str, hints: Sequence[str], name: str) -> str:
    """A cell for each (time, row) of ``values``, row 0 on top. ``colors``: what the classes of its levels begin with;
    ``low`` and ``high``: where the scale begins and ends."""
    times, rows = values.shape
    cells = _binned(_binned(values, MAX_COLUMNS).T, MAX_ROWS)
    level = np.clip(((cells - low) / (high - low) * LEVELS).astype(np.int64), 0, LEVELS - 1)
    shapes = []
    for one in range(LEVELS):
        runs = "".join(_runs(level == one))
        if runs:
            shapes.append(f'<path class="{colors}{one}" d="{runs}"/>')
    shown_rows, shown_columns = cells.shape
    marks = sorted({0, rows // 2, rows - 1})
    labels = [(str(row), (row + 0.5) / rows) for row in marks]
    bands = _hints(_thinned_hints(hints, shown_columns), height=shown_rows)
    return _plot("".join(shapes) + bands, (shown_columns, shown_rows), labels, times, name)


def scale(colors: str, low: str, high: str) -> str:
    """What the colours of a heat map mean."""
    chips = "".join(f'<rect class="{colors}{one}" x="{one}" y="0" width="1" height="1"/>' for one in range(LEVELS))
    drawing = f'<svg viewBox="0 0 {LEVELS} 1" preserveAspectRatio="none" aria-hidden="true">{chips}</svg>'
    return f'<span class="scale">{escape(low)} {drawing} {escape(high)}</span>'


def _plot(shapes: str, size: tuple[int, int], y_labels: Sequence[tuple[str, float]], times: int, name: str) -> str:
    left = "".join(f'<span style="top:{100 * at:.2f}%">{escape(text)}</span>' for text, at in y_labels)
    below = "".join(f'<span style="left:{100 * (t + 0.5) / times:.2f}%">{t}</span>' for t in _time_marks(times))
    return (
        f'<div class="plot"><div class="y">{left}</div>'
        f'<svg viewBox="0 0 {size[0]} {size[1]}" preserveAspectRatio="none" role="img" aria-label="{escape(name)}">'
        f'{shapes}</svg><div class="x">{below}</div></div>'
    )


def _hints(hints: Sequence[str], height: int = _HEIGHT) -> str:
    """Bands that show nothing but a text where the pointer rests."""
    return "".join(
        f'<rect class="hint" x="{t}" y="0" width="1" height="{height}"><title>{escape(text)}</title></rect>'
        for t, text in enumerate(hints)
    )


def _y(value: float, low: float, high: float) -> int:
    share = (min(max(value, low), high) - low) / (high - low)
    return round((1.0 - share) * _HEIGHT)


def _ticks(low: float, high: float) -> list[float]:
    """Round values between ``low`` and ``high``, three to six of them."""
    span = high - low
    step = next(s for s in (10.0**-e * m for e in range(9, -3, -1) for m in (1, 2, 5)) if span / s <= 5.001)
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [n * step for n in range(first, last + 1)]


def _time_marks(times: int) -> list[int]:
    """At most five of the times, the first and the last among them."""
    return sorted({int(t) for t in np.linspace(0, times - 1, min(times, 5))})


def _thinned(values: F64) -> list[tuple[int, float]]:
    """(time, value), at most some thousand of them."""
    step = max(1, len(values) // 1000)
    return [(t, float(values[t])) for t in range(0, len(values), step)]


def _thinned_hints(hints: Sequence[str], columns: int) -> list[str]:
    edges = np.linspace(0, len(hints), columns + 1).astype(int)
    return [hints[first] for first in edges[:-1]]


def _binned(values: F64, most: int) -> F64:
    """Means of neighbours along the first dimension, so that there are at most ``most``."""
    count = len(values)
    if count <= most:
        return values
    edges = np.linspace(0, count, most + 1).astype(int)
    sums: F64 = np.add.reduceat(values, edges[:-1], axis=0)
    return sums / np.diff(edges)[:, None]


def _runs(cells: np.ndarray[Any, np.dtype[np.bool_]]) -> list[str]:
    """Path commands for the cells of (rows, columns) that are set, neighbours in a row drawn as one."""
    runs = []
    for row, line in enumerate(cells):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        runs += [f"M{first} {row}h{end - first}v1h{first - end}z" for first, end in edges.reshape(-1, 2)]
    return runs
