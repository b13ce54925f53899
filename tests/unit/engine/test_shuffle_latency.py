"""What is made of times between tokens in windows with and without moving experts."""

from __future__ import annotations

import pytest

from drumline.engine.bench.shuffle_latency import Window, latency_figures

STILL, MOVING = Window(False, 0.0, 1.0), Window(True, 1.0, 2.0)


def tokens(start: float, end: float, every: float) -> list[tuple[float, float]]:
    """One every so many seconds, the first of them after ``start``."""
    return [(start + (number + 1) * every, every) for number in range(round((end - start) / every))]


def test_a_ratio_is_that_of_windows_side_by_side() -> None:
    figures = latency_figures([STILL, MOVING], tokens(0.0, 1.0, 0.01) + tokens(1.0, 2.0, 0.0125))
    assert figures is not None
    assert (figures.pairs, figures.window_s, figures.tokens) == (1, 1.0, 180)
    assert (figures.p50_still_ms, figures.p99_still_ms) == (10.0, 10.0)
    assert (figures.p50_moving_ms, figures.p99_moving_ms) == (12.5, 12.5)
    assert (figures.p50_ratio, figures.p99_ratio) == (1.25, 1.25)


def test_one_bad_pair_of_three_does_not_tell() -> None:
    windows = [
        Window(moving, start, start + 1.0) for start, moving in enumerate((False, True, True, False, True, False))
    ]
    every = (0.01, 0.011, 0.1, 0.01, 0.011, 0.01)
    gaps = [one for window, gap in zip(windows, every, strict=True) for one in tokens(window.start, window.end, gap)]
    figures = latency_figures(windows, gaps)
    assert figures is not None
    assert figures.p99_ratio == pytest.approx(1.1)
    assert figures.p99_ratio_high > 5.0


def test_a_time_that_began_in_another_window_belongs_to_none() -> None:
    gaps = [*tokens(0.0, 1.0, 0.01), (1.05, 0.09), *tokens(1.05, 1.95, 0.01), (2.05, 0.11)]
    figures = latency_figures([STILL, MOVING], gaps)
    assert figures is not None
    assert figures.p99_moving_ms == pytest.approx(10.0)


def test_without_a_whole_pair_there_are_no_figures() -> None:
    assert latency_figures([STILL], tokens(0.0, 1.0, 0.01)) is None
    assert latency_figures([STILL, MOVING], tokens(0.0, 1.0, 0.01)) is None
    with pytest.raises(ValueError, match="same kind"):
        latency_figures([STILL, Window(False, 1.0, 2.0)], [])
