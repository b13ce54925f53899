"""The coordinator's clock does not count time in which the coordinator itself was stopped."""

from __future__ import annotations

from drumline.engine.running_clock import LONGEST_GAP_S, RunningClock


def test_time_passes_as_it_does_while_the_clock_is_read() -> None:
    times = iter([100.0, 100.5, 101.5, 103.5])
    clock = RunningClock(lambda: next(times))
    assert [clock.now(), clock.now(), clock.now()] == [100.5, 101.5, 103.5]
    assert clock.stalled_s == 0.0


def test_a_long_gap_counts_as_a_short_one() -> None:
    times = iter([0.0, 1.0, 61.0, 62.0])
    clock = RunningClock(lambda: next(times))
    assert clock.now() == 1.0
    assert clock.now() == 1.0 + LONGEST_GAP_S
    assert clock.now() == 2.0 + LONGEST_GAP_S
    assert clock.stalled_s == 60.0 - LONGEST_GAP_S
