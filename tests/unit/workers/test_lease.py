from __future__ import annotations

import pytest

from drumline.workers.lease import FIRST_RETRY_S, LAST_RETRY_S, Lease


def test_the_lease_runs_from_the_first_loss_until_a_welcome() -> None:
    lease = Lease()
    assert not lease.runs
    lease.lost(100.0, 60.0)
    lease.lost(130.0, 60.0)
    assert lease.runs
    assert not lease.over(159.9)
    assert lease.over(160.0)
    lease.welcomed()
    assert not lease.runs
    assert not lease.over(1000.0)
    lease.lost(1000.0, 60.0)
    assert lease.ends_at == 1060.0


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_retries_slow_down_and_are_spread(drawn: float) -> None:
    lease = Lease(lambda: drawn)
    delays = []
    for _ in range(8):
        lease.lost(0.0, 60.0)
        delays.append(lease.retry_at)
    spread = 0.5 + 0.5 * drawn
    assert delays[0] == pytest.approx(FIRST_RETRY_S * spread)
    assert delays[1] == pytest.approx(2 * FIRST_RETRY_S * spread)
    assert delays[-1] == pytest.approx(LAST_RETRY_S * spread)
    lease.welcomed()
    lease.lost(0.0, 60.0)
    assert lease.retry_at == pytest.approx(FIRST_RETRY_S * spread)
