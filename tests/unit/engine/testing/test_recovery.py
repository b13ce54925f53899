"""How long streams stand still after faults."""

from __future__ import annotations

import pytest

from drumline.engine.testing.recovery import Recoveries, Spread


def test_tokens_that_were_on_their_way_do_not_count_as_recovery() -> None:
    recoveries = Recoveries(1)
    recoveries.fault("kill", 10.0)
    for at in (10.01, 10.02, 10.45, 10.47, 11.1):
        recoveries.token(0, at)
    assert recoveries.times["kill"] == [pytest.approx(1.1)]


def test_the_longest_silence_in_the_second_after_the_fault_is_what_counts() -> None:
    recoveries = Recoveries(1)
    recoveries.fault("kill", 10.0)
    for at in (10.05, 10.35, 10.5, 10.7, 10.9, 11.05):
        recoveries.token(0, at)
    assert recoveries.times["kill"] == [pytest.approx(0.35)]


def test_a_silence_counts_for_as_long_as_it_lasts() -> None:
    recoveries = Recoveries(1)
    recoveries.fault("stop", 10.0)
    recoveries.token(0, 14.0)
    recoveries.token(0, 30.0)
    assert recoveries.times["stop"] == [4.0]


def test_every_stream_counts_and_so_does_every_fault() -> None:
    recoveries = Recoveries(2)
    recoveries.fault("kill", 0.0)
    recoveries.fault("nan", 0.5)
    for stream in range(2):
        recoveries.token(stream, 2.0)
    assert {kind: spread.count for kind, spread in recoveries.spreads().items()} == {"kill": 2, "nan": 2}


@pytest.mark.parametrize(
    ("times", "expected"),
    [([], (0, 0.0, 0.0, 0.0)), ([3.0], (1, 3.0, 3.0, 3.0)), (range(101), (101, 50.0, 99.0, 100.0))],
)
def test_a_spread_is_of_the_times_themselves(times: list[float], expected: tuple[float, ...]) -> None:
    spread = Spread.of(float(time) for time in times)
    assert (spread.count, spread.p50_s, spread.p99_s, spread.max_s) == expected
