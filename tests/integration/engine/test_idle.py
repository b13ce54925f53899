"""An engine without work costs nothing but heartbeats."""

from __future__ import annotations

from tests.benchmarks.idle import idle_share
from tests.integration.engine.test_life import TWO

LIMIT = 1.5
WINDOWS = 3


async def test_an_idle_engine_uses_next_to_nothing_of_a_core(mark: str) -> None:
    # The budget is 1 % over 30 s; CPU time is counted in ticks of 10 ms, so a short window gets some slack. Other tests
    # on the same cores make each wake-up dearer: what spins does so in every window.
    shares: list[float] = []
    while len(shares) < WINDOWS and min(shares, default=LIMIT) >= LIMIT:
        share = (await idle_share(TWO, 10.0))["core_percent"]
        assert isinstance(share, float)
        shares.append(share)
    assert min(shares) < LIMIT, shares
