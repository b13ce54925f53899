"""What any plan of the policy ``incremental`` keeps to, whatever it is asked."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
from hypothesis import given, settings

from drumline.engine.core.balance.measure import balancedness
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from tests.unit.core.balance_requests import carry_out, held, repairs, requests, slot_rank

EXAMPLES = settings(max_examples=80, deadline=None)


def _plan(request: PlanRequest) -> PlacementPlan | None:
    """None where there cannot be a plan."""
    plan = make_plan(request, time.perf_counter)
    room = sum(rank >= 0 for rank in slot_rank(request))
    assert bool(plan.error) == (room < request.load.shape[1])
    if plan.error:
        assert plan.placement is request.placement
        assert not len(plan.moves)
        return None
    return plan


@EXAMPLES
@given(requests())
def test_every_expert_has_a_live_slot_and_none_has_two_on_a_rank_that_could_hold_others(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is None:
        return
    experts = request.load.shape[1]
    for layer in range(request.num_layers):
        live = set(slot_rank(request)) - {-1}
        by_rank = [held(request, plan.placement, layer, rank) for rank in live]
        assert set().union(*by_rank) == set(range(experts))
        for own in by_rank:
            assert len(set(own)) in (len(own), experts)
    dead = np.asarray(slot_rank(request)) < 0
    assert (plan.placement[:, dead] == request.placement[:, dead]).all()


@EXAMPLES
@given(requests())
def test_the_moves_lead_to_the_placement_from_live_copies(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is not None:
        assert (carry_out(request, plan) == plan.placement).all()
        assert plan.slots_moved == len(plan.moves) == np.count_nonzero(plan.placement != request.placement)
        assert (np.diff(plan.moves[:, 0]) >= 0).all()


@EXAMPLES
@given(requests())
def test_no_more_slots_change_than_may_beside_those_that_must(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is not None:
        room = sum(rank >= 0 for rank in slot_rank(request)) * request.num_layers
        assert plan.slots_moved <= int(request.max_moved * room) + repairs(request)


@EXAMPLES
@given(requests())
def test_an_expert_that_stays_on_its_rank_stays_in_its_slot(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is None:
        return
    ranks = np.asarray(slot_rank(request))
    for layer in range(request.num_layers):
        for rank in set(ranks.tolist()) - {-1}:
            before, after = (Counter(held(request, one, layer, rank)) for one in (request.placement, plan.placement))
            same = (plan.placement[layer] == request.placement[layer]) & (ranks == rank) & (plan.placement[layer] >= 0)
            assert Counter(plan.placement[layer, same].tolist()) == before & after


@EXAMPLES
@given(requests())
def test_the_same_request_gets_the_same_plan(request: PlanRequest) -> None:
    one, other = (make_plan(request, lambda: 0.0) for _ in range(2))
    assert (one.placement == other.placement).all()
    assert one.reason == other.reason


@EXAMPLES
@given(requests(sound=True))
def test_copies_are_on_as_many_nodes_as_before_or_as_there_are_copies(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is None:
        return
    nodes = request.nodes[slot_rank(request)]
    for before, after in zip(request.placement, plan.placement, strict=True):
        for expert in range(request.load.shape[1]):
            was, now = (len(np.unique(nodes[one == expert])) for one in (before, after))
            assert now >= min(was, int((after == expert).sum()))


@EXAMPLES
@given(requests(sound=True))
def test_a_layer_changes_only_where_it_or_all_of_them_gain_what_is_asked(request: PlanRequest) -> None:
    plan = _plan(request)
    if plan is None:
        return
    load, ranks = request.snapshots(), np.asarray(slot_rank(request), dtype=np.int32)
    if len(load) > 1:
        return
    before, after = (balancedness(load[0], one, ranks) for one in (request.placement, plan.placement))
    changed = (plan.placement != request.placement).any(axis=1)
    gain = after - before
    assert (gain[changed] >= 0.2 * request.min_gain - 1e-5).all()
    assert not changed.any() or gain.max() >= request.min_gain - 1e-5
    assert changed.any() or "nothing to move" in plan.reason
