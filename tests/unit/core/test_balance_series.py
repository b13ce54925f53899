"""What holds after every plan of a series, of sizes at which experts have several copies on several nodes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from drumline.engine.core.balance.policies import make_plan
from drumline.protocol.messages import I32Matrix
from tests.unit.core.balance_requests import carry_out, even_request

LAYERS, EXPERTS, SLOTS, RANKS, NODES = 6, 24, 45, 9, 3
RANK = np.repeat(np.arange(RANKS), SLOTS // RANKS)


def _counts(placement: I32Matrix, groups: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """(layers, groups, experts): copies by rank, or by node, which share the slots out evenly."""
    by_group = placement.reshape(LAYERS, groups, -1)
    return np.stack([[np.bincount(own, minlength=EXPERTS) for own in layer] for layer in by_group])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_copies_spread_over_ranks_and_nodes_and_what_stays_stays(seed: int, sigma: float) -> None:
    random = np.random.default_rng(seed)
    # Copies on neighbouring nodes, so that spread is there from the first.
    placement = np.tile(np.arange(SLOTS, dtype=np.int32) % EXPERTS, (LAYERS, 1))
    for _ in range(5):
        load = random.lognormal(0.0, sigma, (LAYERS, EXPERTS))
        request = even_request(load, SLOTS, RANKS, NODES, placement=placement, max_moved=1.0)
        plan = make_plan(request, time.perf_counter)
        assert (carry_out(request, plan) == plan.placement).all()
        before, after = _counts(placement, RANKS), _counts(plan.placement, RANKS)
        assert after.max() == 1
        assert after.sum(axis=1).min() == 1
        on_nodes = (_counts(plan.placement, NODES) > 0).sum(axis=1)
        assert (on_nodes == np.minimum(after.sum(axis=1), NODES)).all()
        stayed = np.count_nonzero(plan.placement == placement)
        assert stayed == np.minimum(before, after).sum()
        placement = plan.placement
