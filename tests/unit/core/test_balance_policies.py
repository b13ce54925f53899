"""Plans: what each policy makes of loads, how it gets there, and what it says."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from drumline.engine.core.balance.measure import balancedness
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix
from drumline.protocol.rebalance import rebalance_experts
from tests.unit.core.balance_requests import carry_out, even_request

F64 = np.ndarray[Any, np.dtype[np.float64]]
LAYERS, EXPERTS, SLOTS, RANKS, NODES = 12, 64, 80, 8, 2
RANK = np.repeat(np.arange(RANKS), SLOTS // RANKS)


def _plan(load: F64, placement: I32Matrix | None = None, policy: str = "incremental", **more: object) -> PlacementPlan:
    request = even_request(load, SLOTS, RANKS, NODES, policy, placement, num_groups=4, **more)
    plan = make_plan(request, time.perf_counter)
    assert not plan.error
    assert (carry_out(request, plan) == plan.placement).all()
    return plan


def _lognormal(seed: int = 0) -> F64:
    return np.random.default_rng(seed).lognormal(0.0, 1.0, (LAYERS, EXPERTS))


def _published(load: F64) -> float:
    return float(balancedness(load, rebalance_experts(load, SLOTS, 1, 1, RANKS)[0], RANK).mean())


def _settled(load: F64) -> I32Matrix:
    placement = None
    for _ in range(3):
        placement = _plan(load, placement).placement
    assert placement is not None
    return placement


def _zipf() -> F64:
    popularity = np.arange(1.0, EXPERTS + 1.0) ** -1.2
    return np.random.default_rng(0).permuted(np.tile(popularity, (LAYERS, 1)), axis=1)


@pytest.mark.parametrize("load", [_lognormal(), _zipf()], ids=["lognormal", "zipf"])
def test_three_plans_of_a_quarter_of_the_slots_balance_as_well_as_solving_afresh(load: F64) -> None:
    placement = None
    for _ in range(3):
        plan = _plan(load, placement)
        assert plan.slots_moved <= LAYERS * SLOTS // 4
        placement = plan.placement
    assert placement is not None
    assert balancedness(load, placement, RANK).mean() >= _published(load) - 0.002


def test_a_load_that_drifts_is_followed_within_a_quarter_of_the_slots() -> None:
    loads, placement = [_lognormal()], _settled(_lognormal())
    for seed in range(1, 5):
        loads.append(0.7 * loads[-1] + 0.3 * _lognormal(seed))
        plan = _plan(np.stack(loads), placement)
        assert plan.slots_moved <= LAYERS * SLOTS // 4
        placement = plan.placement
        assert balancedness(loads[-1], placement, RANK).mean() >= _published(loads[-1]) - 0.002


@pytest.mark.parametrize("window", [1, 4])
def test_noise_moves_next_to_nothing(window: int) -> None:
    mean = _lognormal()
    placement = _settled(mean)
    start = balancedness(mean, placement, RANK).mean()
    random, seen = np.random.default_rng(1), [mean]
    for _ in range(6):
        seen.append(mean * (1.0 + 0.05 * random.standard_normal(mean.shape)))
        plan = _plan(np.stack(seen[-window:]), placement)
        assert plan.slots_moved <= 0.01 * LAYERS * SLOTS
        placement = plan.placement
    assert balancedness(mean, placement, RANK).mean() >= start - 0.002


def test_what_noise_has_made_uneven_is_mended_slowly() -> None:
    mean, random = _lognormal(), np.random.default_rng(1)
    loads = mean * (1.0 + 0.05 * random.standard_normal((16, *mean.shape)))
    placement = _settled(loads[0])
    start = balancedness(mean, placement, RANK).mean()
    for now in range(8, 16):
        plan = _plan(loads[now - 8 : now], placement)
        assert plan.slots_moved <= 0.01 * LAYERS * SLOTS
        placement = plan.placement
    assert balancedness(mean, placement, RANK).mean() > start


def test_what_is_not_worth_it_is_not_done_and_said() -> None:
    plan = _plan(_lognormal(), min_gain=0.9)
    assert not len(plan.moves)
    assert plan.reason.startswith(f"nothing to move: balancedness is {plan.balancedness:.4f}, no layer would gain 0.9")
    assert plan.balancedness == plan.balancedness_before


def test_an_even_load_on_an_even_placement_is_left_alone() -> None:
    flat = np.ones((LAYERS, EXPERTS))
    placement = _settled(flat)
    assert not len(_plan(flat, placement).moves)


def test_a_plan_says_what_it_does() -> None:
    load = _lognormal()
    plan = _plan(load)
    assert plan.balancedness == pytest.approx(balancedness(load.astype(np.float32), plan.placement, RANK).mean())
    assert plan.balancedness_before < plan.balancedness
    assert plan.reason == (
        f"balancedness {plan.balancedness_before:.4f} to {plan.balancedness:.4f} with {plan.slots_moved:,} of 960 slots"
        " moved"
    )
    source, receiver = plan.moves[:, 2], RANK[plan.moves[:, 1]]
    assert plan.bytes_moved == 100 * np.count_nonzero(source != receiver)
    assert plan.cross_node_bytes == 100 * np.count_nonzero(source // 4 != receiver // 4)
    counts = np.stack([np.bincount(row, minlength=EXPERTS) for row in plan.placement])
    assert plan.single_copy == np.count_nonzero(counts == 1)
    assert plan.solve_ms > 0.0


def test_a_copy_comes_from_the_node_of_its_receiver_where_that_has_one() -> None:
    plan = _plan(_lognormal())
    before = even_request(_lognormal(), SLOTS, RANKS, NODES).placement
    for layer, slot, source, _ in plan.moves.tolist():
        holders = set((RANK[before[layer] == plan.placement[layer, slot]] // 4).tolist())
        assert (source // 4 == RANK[slot] // 4) == (RANK[slot] // 4 in holders)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_the_published_policies_balance_as_published_and_move_no_more(policy: str) -> None:
    load, placement = _lognormal().astype(np.float32).astype(np.float64), _settled(_lognormal(5))
    plan = _plan(load, placement, policy)
    groups, nodes = (4, NODES) if policy == "hierarchical" else (1, 1)
    published = rebalance_experts(load, SLOTS, groups, nodes, RANKS)[0]
    assert balancedness(load, plan.placement, RANK) == pytest.approx(balancedness(load, published, RANK))
    assert plan.slots_moved < np.count_nonzero(published != placement)
    assert not len(_plan(load, plan.placement, policy).moves)


def test_a_published_placement_with_its_ranks_in_another_order_stands() -> None:
    load = _lognormal().astype(np.float32).astype(np.float64)
    ranks = rebalance_experts(load, SLOTS, 1, 1, RANKS)[0].astype(np.int32).reshape(LAYERS, RANKS, -1)
    shuffled = np.random.default_rng(0).permuted(ranks[:, ::-1], axis=2).reshape(LAYERS, SLOTS)
    assert not len(_plan(load, shuffled, "global").moves)


def test_hierarchical_keeps_groups_on_nodes() -> None:
    plan = _plan(_lognormal(), policy="hierarchical")
    for row in plan.placement.reshape(LAYERS, NODES, -1) // (EXPERTS // 4):
        assert not set(row[0].tolist()) & set(row[1].tolist())


def test_a_target_is_taken_as_it_is() -> None:
    target = _settled(_zipf())
    plan = _plan(_lognormal(), target=target)
    assert (plan.placement == target).all()
    assert "as asked for" in plan.reason


def test_the_slots_of_a_dead_rank_stay_and_what_it_alone_had_comes_from_the_checkpoint() -> None:
    request = even_request(np.ones((1, 6)), 8, 4, dead=np.array([1], dtype=np.int32))
    plan = make_plan(request, time.perf_counter)
    assert (carry_out(request, plan) == plan.placement).all()
    assert plan.placement[0, 2:4].tolist() == [2, 3]
    assert sorted(plan.placement[0, [0, 1, 4, 5, 6, 7]].tolist()) == list(range(6))
    assert sorted((plan.moves[:, 2]).tolist()) == [-1, -1]
    assert plan.bytes_moved == 0


def test_too_few_live_slots_are_no_plan() -> None:
    request = even_request(np.ones((1, 6)), 8, 4, dead=np.array([0, 1], dtype=np.int32))
    plan = make_plan(request, time.perf_counter)
    assert plan.error == "slots: found 4 on 2 live ranks; valid: 6 or more, one for each expert"
    assert plan.number == request.number


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_the_published_policies_need_even_ranks(policy: str) -> None:
    plan = make_plan(even_request(np.ones((1, 6)), 9, 4, policy=policy), time.perf_counter)
    assert plan.error.startswith("slots: found [2, 3] on ranks; valid: as many on each")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"policy": "best"}, "policy"),
        ({"load": np.ones((3, 6), dtype=np.float32), "num_layers": 2}, "load"),
        ({"load": np.full((1, 6), np.nan, dtype=np.float32)}, "load"),
        ({"nodes": np.zeros(3, dtype=np.int32)}, "nodes"),
        ({"placement": np.zeros((1, 7), dtype=np.int32)}, "placement"),
        ({"placement": np.full((1, 8), 6, dtype=np.int32)}, "placement"),
        ({"target": np.zeros((2, 8), dtype=np.int32)}, "target"),
        ({"dead": np.array([4], dtype=np.int32)}, "dead"),
        ({"max_moved": 1.5}, "max_moved"),
        ({"min_gain": -0.1}, "min_gain"),
    ],
)
def test_a_request_that_does_not_fit_together_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    request = even_request(np.ones((1, 6)), 8, 4)
    fields = {name: getattr(request, name) for name in request.__struct_fields__} | change
    with pytest.raises(InvalidConfig) as caught:
        make_plan(PlanRequest(**fields), time.perf_counter)
    assert caught.value.field == field
