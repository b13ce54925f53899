"""An engine without work costs nothing but heartbeats."""

from __future__ import annotations

from tests.benchmarks.idle import idle_share
from tests.integration.engine.test_life import TWO


async def test_an_idle_engine_uses_next_to_nothing_of_a_core(mark: str) -> None:
    share = (await idle_share(TWO, 10.0))["core_percent"]
    # The budget is 1 % over 30 s; CPU time is counted in ticks of 10 ms, so a short window gets some slack.
    assert isinstance(share, float)
    assert share < 1.5
