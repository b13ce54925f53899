"""Times between tokens while experts move and while they do not, in windows that alternate; no clock, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

F64 = np.ndarray[Any, np.dtype[np.float64]]


class Window(msgspec.Struct, frozen=True):
    """From ``start`` to ``end``, in seconds. ``moving``: experts moved all the time."""

    moving: bool
    start: float
    end: float


class LatencyFigures(msgspec.Struct, frozen=True):
    """Inter-token latency over ``pairs`` of windows, one with experts on the move and one without. ``p50_*`` and
    ``p99_*``: medians over the windows of each kind; ``*_ratio``: the median over pairs of moving over still;
    ``p99_ratio_low`` and ``p99_ratio_high``: the quartiles of that. ``tokens``: times between tokens, in all."""

    pairs: int
    window_s: float
    tokens: int
    p50_still_ms: float
    p50_moving_ms: float
    p50_ratio: float
    p99_still_ms: float
    p99_moving_ms: float
    p99_ratio: float
    p99_ratio_low: float
    p99_ratio_high: float


def latency_figures(windows: Sequence[Window], gaps: Sequence[tuple[float, float]]) -> LatencyFigures | None:
    """``windows``: a moving one and a still one in turn, in any order within a pair. ``gaps``: when a token came, and
    how long after the one before; those that began in another window belong to none. None before there is a pair whose
    windows both have a time."""
    ends, times = np.array(gaps, dtype=np.float64).reshape(-1, 2).T
    pairs: list[tuple[F64, F64]] = []
    lengths: list[float] = []
    for first, second in zip(windows[::2], windows[1::2], strict=False):
        moving, still = (first, second) if first.moving else (second, first)
        if moving.moving == still.moving:
            raise ValueError("two windows of a pair are of the same kind")
        both = (_within(moving, ends, times), _within(still, ends, times))
        if all(len(one) for one in both):
            pairs.append(both)
            lengths += [moving.end - moving.start, still.end - still.start]
    if not pairs:
        return None
    # (pairs, moving and still, p50 and p99)
    table = 1e3 * np.array([[np.percentile(one, (50, 99)) for one in both] for both in pairs])
    ratios = table[:, 0] / table[:, 1]
    moving_ms, still_ms = np.median(table, axis=0)
    low, high = np.percentile(ratios[:, 1], (25, 75))
    return LatencyFigures(
        pairs=len(pairs),
        window_s=_figure(np.mean(lengths)),
        tokens=sum(len(one) for both in pairs for one in both),
        p50_still_ms=_figure(still_ms[0]),
        p50_moving_ms=_figure(moving_ms[0]),
        p50_ratio=_figure(np.median(ratios[:, 0])),
        p99_still_ms=_figure(still_ms[1]),
        p99_moving_ms=_figure(moving_ms[1]),
        p99_ratio=_figure(np.median(ratios[:, 1])),
        p99_ratio_low=_figure(low),
        p99_ratio_high=_figure(high),
    )


def _within(window: Window, ends: F64, times: F64) -> F64:
    found: F64 = times[(ends <= window.end) & (ends - times >= window.start)]
    return found


def _figure(number: Any) -> float:
    return round(float(number), 3)
