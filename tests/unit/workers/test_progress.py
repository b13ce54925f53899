"""What a rank says of how far it is."""

from __future__ import annotations

import time

import pytest

from drumline.workers.progress import Progress


def test_a_lease_runs_out_while_it_is_told_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    record = Progress()
    assert record.lease_left() == 0.0
    record.grant_lease(60.0)
    left = []
    for _ in range(4):
        left.append(record.lease_left())
        now[0] += 25.0
    assert left == [60.0, 35.0, 10.0, 0.0]


def test_the_end_of_a_lease_and_of_an_epoch_leave_nothing_of_it() -> None:
    record = Progress()
    record.grant_lease(60.0)
    record.grant_lease(0.0)
    assert record.lease_left() == 0.0
    record.grant_lease(60.0)
    record.leave_epoch()
    assert record.lease_left() == 0.0
