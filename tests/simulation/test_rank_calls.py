"""100,000 random control calls: every reply belongs to its own call."""

from __future__ import annotations

import pytest

from tests.simulation.rank_calls import RandomCalls


@pytest.mark.parametrize("seed", range(4))
def test_every_reply_of_25_000_random_calls_belongs_to_its_own(seed: int) -> None:
    seen = RandomCalls(seed).run(25_000)
    assert seen["calls"] >= 25_000
    for kind in ("values", "errors", "timed out", "late", "forged", "refused", "deaths", "abandoned"):
        assert seen[kind] > 20, seen
