"""The balancer that users of vLLM know: what it counts, when it moves, and that maps and weights say the same after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix
from drumline.workers.experts import EplbState, MixtureOfExperts, is_mixture_of_experts
from tests.parity.threadgroup import ThreadGroup, ThreadMember
from tests.parity.threadworld import on_each
from tests.unit.workers.balanced import Model, Parallel, Settings
from tests.unit.workers.shuffles import check_held

CPU = torch.device("cpu")
LAYERS, EXPERTS, SLOTS, RANKS = 2, 6, 8, 2
INITIAL = [0, 1, 2, 3, 4, 5, 0, 1]


def placement(*layers: Sequence[int]) -> I32Matrix:
    return np.array(layers, dtype=np.int32)


def columns(slots: I32Matrix, rank: int, ranks: int) -> I32Matrix:
    width = slots.shape[1] // ranks
    return slots[:, rank * width : rank * width + width]


def fixed(*layers: Sequence[int]) -> Callable[..., tuple[Any, Any, Any]]:
    """A policy that always wants this."""
    return lambda weight, slots, groups, nodes, ranks: (np.array(layers), None, None)


class World:
    """A model and its state on each of some ranks."""

    def __init__(self, held: I32Matrix, ranks: int = RANKS, settings: Settings | None = None, **options: Any) -> None:
        group = ThreadGroup(range(ranks))
        self.ranks = range(ranks)
        self.groups = [group.member(rank) for rank in self.ranks]
        self.models = [Model(columns(held, rank, ranks), held.shape[1], EXPERTS) for rank in self.ranks]
        self.states: dict[int, EplbState] = {}
        parallel = Parallel(settings or Settings(held.shape[1] - EXPERTS))

        def build(rank: int) -> None:
            given = {"ep_group": self.groups[rank]} | options
            self.states[rank] = EplbState.build(self.models[rank], CPU, parallel, **given)

        on_each(self.ranks, build)

    def each(self, function: Callable[[EplbState, Model], Any]) -> list[Any]:
        found: dict[int, Any] = {}

        def run(rank: int) -> None:
            found[rank] = function(self.states[rank], self.models[rank])

        on_each(self.ranks, run)
        return [found[rank] for rank in self.ranks]

    def step(self, loads: Mapping[int, Sequence[int]] | None = None, **options: Any) -> None:
        """A step in which rank r's slots compute ``loads[r]`` tokens, in every layer."""
        for rank, counts in (loads or {}).items():
            self.models[rank].state[0].add_(torch.tensor(counts))
        self.each(lambda state, model: state.step(model, **options))

    def check(self, wanted: I32Matrix) -> None:
        """Weights and maps of every rank are those of ``wanted``."""
        for rank in self.ranks:
            check_held(self.models[rank].expert_weights, columns(wanted, rank, len(self.ranks)))
            _, slots, counts = self.models[rank].state
            assert self.states[rank].physical_to_logical_map.tolist() == wanted.tolist()
            for layer, experts in enumerate(wanted):
                copies = [np.flatnonzero(experts == expert).tolist() for expert in range(EXPERTS)]
                assert counts[layer].tolist() == [len(of) for of in copies]
                room = slots.shape[2]
                assert slots[layer].tolist() == [of + [-1] * (room - len(of)) for of in copies]


OTHER = placement([5, 5, 2, 3, 4, 1, 0, 5], [1, 0, 3, 2, 5, 4, 4, 4])


def initial() -> World:
    return World(placement(INITIAL, INITIAL), policy=fixed(*OTHER))


# --------------------------------------------------------------------------------------------------------------- build


def test_the_first_placement_is_all_experts_and_then_copies_round_and_round() -> None:
    assert EplbState.build_initial_global_physical_to_logical_map(3, 5) == [0, 1, 2, 0, 1, 2, 0, 1]
    initial().check(placement(INITIAL, INITIAL))


def test_shapes_are_those_that_users_know() -> None:
    state = initial().states[0]
    assert state.physical_to_logical_map.shape == (LAYERS, SLOTS)
    assert state.logical_to_physical_map.shape == (LAYERS, EXPERTS, SLOTS - EXPERTS + 1)
    assert state.logical_replica_count.shape == (LAYERS, EXPERTS)
    assert state.expert_load_pass.shape == (LAYERS, SLOTS // RANKS)
    assert state.expert_load_window.shape == (3, LAYERS, SLOTS // RANKS)


def test_a_load_that_is_known_at_the_start_is_planned_on_at_once() -> None:
    load, asked = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS), []

    def policy(weight: Any, *numbers: int) -> tuple[Any, Any, Any]:
        asked.append((weight.tolist(), numbers))
        return OTHER, None, None

    world = World(placement(INITIAL, INITIAL), policy=policy, global_expert_load=load)
    world.check(OTHER)
    assert asked == [(load.tolist(), (SLOTS, 1, 1, RANKS))] * RANKS
    assert world.states[0].expert_rearrangement_step == 0


def test_a_rank_that_comes_gets_its_experts_when_the_state_is_built() -> None:
    old = placement(INITIAL, INITIAL)
    held = np.concatenate([old, np.full((LAYERS, 4), -1, dtype=np.int32)], axis=1)
    new = np.concatenate([OTHER, OTHER[:, :4]], axis=1)
    world = World(
        held,
        ranks=3,
        policy=fixed(*new),
        global_expert_load=torch.ones(LAYERS, EXPERTS),
        old_global_expert_indices=torch.from_numpy(old),
        rank_mapping={0: 0, 1: 1},
    )
    world.check(new)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": Settings(1)}, "num_redundant_experts.*1.*2, which the model has"),
        ({"rank_mapping": {0: 0, 1: -1}}, "global_expert_load.*None"),
        ({"slots": (3, 4)}, r"slots.*\[3, 4\].*2 numbers that add up to 8, 4 for rank"),
        ({"ep_group": 3}, "ep_group.*int"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        World(placement(INITIAL, INITIAL), **changes)


def test_slots_that_the_policy_cannot_share_out_are_refused_at_the_start() -> None:
    model = Model(placement([0, 1, 2, 3]), 7, EXPERTS)
    group = ThreadGroup(range(2)).member(0)
    with pytest.raises(ValueError, match="num_replicas"):
        EplbState.build(model, CPU, Parallel(Settings(1)), ep_group=group)


# ---------------------------------------------------------------------------------------------------------------- steps


def test_loads_of_the_last_steps_stand_in_the_window_and_dummies_do_not() -> None:
    world = initial()
    state = world.states[0]
    world.step({0: [1, 2, 3, 4]})
    assert state.expert_load_window[0].tolist() == [[1, 2, 3, 4]] * LAYERS
    assert not state.expert_load_pass.any()
    world.models[0].state[0].fill_(7)
    state.expert_rearrangement_step = 0
    world.states[1].expert_rearrangement_step = 0
    world.step(is_dummy=True)
    assert not state.expert_load_pass.any()
    for count in (5, 6, 7):
        world.step({0: [count] * 4})
    # The fourth step that counts takes the place of the first.
    assert state.expert_load_window[:, 0, 0].tolist() == [7, 5, 6]


def test_the_first_rearrangement_comes_after_a_quarter_of_the_interval_and_dummies_bring_it_nearer() -> None:
    world = initial()
    world.step({0: [1, 1, 1, 1]})
    world.check(placement(INITIAL, INITIAL))
    world.step(is_dummy=True)
    world.check(OTHER)
    assert world.states[0].expert_rearrangement_step == 0
    for _ in range(7):
        world.step()
    assert world.states[1].expert_rearrangement_step == 7


def test_it_plans_on_the_load_of_all_ranks_by_logical_expert() -> None:
    asked: list[Any] = []

    def policy(weight: Any, *numbers: int) -> tuple[Any, Any, Any]:
        asked.append(weight.tolist())
        return OTHER, None, None

    world = World(placement(INITIAL, INITIAL), policy=policy)
    asked.clear()
    world.step({0: [1, 2, 3, 4], 1: [5, 6, 7, 8]})
    world.step({0: [10, 10, 10, 10], 1: [0, 0, 0, 100]})
    # Experts 0 and 1 have a second slot on rank 1.
    expected = [11 + 7, 12 + 108, 13, 14, 5, 6]
    assert asked == [[expected] * LAYERS] * RANKS
    assert not world.states[0].expert_load_window.any()


def test_maps_are_written_over_so_that_the_model_needs_no_second_call() -> None:
    world = initial()
    before = [tensor.data_ptr() for tensor in world.models[0].state]
    world.each(lambda state, model: state.rearrange(model))
    world.check(OTHER)
    state = world.states[0]
    read = (state.expert_load_pass, state.logical_to_physical_map, state.logical_replica_count)
    assert [tensor.data_ptr() for tensor in read] == before


def test_balance_is_logged_by_the_first_rank_alone(caplog: pytest.LogCaptureFixture) -> None:
    world = initial()
    with caplog.at_level(logging.INFO, logger="drumline.workers.experts.eplb_state"):
        world.step({0: [1, 2, 3, 4], 1: [5, 5, 5, 5]}, log_stats=True)
    assert caplog.messages == ["EPLB step: avg_tokens=30.00, max_tokens=40, balancedness=0.7500"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="drumline.workers.experts.eplb_state"):
        world.step(is_dummy=True, log_stats=True)
    assert caplog.messages == ["EPLB step: avg_tokens=0.00, max_tokens=0, balancedness=0.0000"]


def test_a_profile_changes_nothing() -> None:
    world = initial()
    for _ in range(10):
        world.step(is_profile=True)
    world.check(placement(INITIAL, INITIAL))
    assert world.states[0].expert_rearrangement_step == 6


def test_without_a_shuffle_the_load_is_returned() -> None:
    world = initial()
    world.step({1: [1, 1, 1, 1]})
    loads = world.each(lambda state, model: state.rearrange(model, execute_shuffle=False))
    assert [load.tolist() for load in loads] == [[[1, 1, 0, 0, 1, 1]] * LAYERS] * RANKS
    world.check(placement(INITIAL, INITIAL))


def test_ranks_that_stay_get_all_experts_before_the_others_go() -> None:
    old = placement([*INITIAL, 2, 3, 4, 5], [*INITIAL, 2, 3, 4, 5])
    world = World(old, ranks=3)
    new = OTHER[:, [4, 5, 6, 7, 0, 1, 2, 3]]
    for state in world.states.values():
        state.policy = fixed(*new)
    world.each(lambda state, model: state.rearrange(model, rank_mapping={0: 1, 1: -1, 2: 0}))
    check_held(world.models[0].expert_weights, columns(new, 1, 2))
    check_held(world.models[2].expert_weights, columns(new, 0, 2))
    assert world.states[0].physical_to_logical_map.tolist() == new.tolist()
    with pytest.raises(InvalidConfig, match=r"rank_mapping.*an entry for each of 3 ranks"):
        world.states[0].rearrange(world.models[0], global_expert_load=torch.ones(1), rank_mapping={0: 0})


def test_ranks_may_have_different_numbers_of_slots_where_the_policy_can_plan_them() -> None:
    first, other = placement(INITIAL), placement([2, 3, 4, 5, 1, 0, 2, 2])
    asked: list[Any] = []

    def policy(weight: Any, *numbers: int) -> tuple[Any, Any, Any]:
        asked.append(weight.tolist())
        return other, None, None

    group, shares = ThreadGroup(range(2)), (slice(0, 5), slice(5, 8))
    models = [Model(first[:, share], SLOTS, EXPERTS) for share in shares]

    def run(rank: int) -> None:
        settings = Parallel(Settings(2, 2, 4))
        member = group.member(rank)
        state = EplbState.build(models[rank], CPU, settings, ep_group=member, slots=(5, 3), policy=policy)
        state.expert_load_pass += 1 + rank
        state.step(models[rank])

    on_each(range(2), run)
    assert asked[2:] == [[[3, 3, 1, 1, 1, 2]]] * 2
    for model, share in zip(models, shares, strict=True):
        check_held(model.expert_weights, other[:, share])


def test_nodes_that_do_not_divide_the_ranks_are_planned_as_one(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def policy(weight: Any, *numbers: int) -> tuple[Any, Any, Any]:
        asked.append(numbers)
        return OTHER, None, None

    World(placement(INITIAL, INITIAL), policy=policy, num_nodes=2)
    World(placement(INITIAL, INITIAL), policy=policy, num_nodes=3)
    assert asked == [(SLOTS, 1, 2, RANKS)] * 2 + [(SLOTS, 1, 1, RANKS)] * 2
    assert "2 ranks do not divide by 3 nodes" in caplog.text


def test_what_has_the_names_is_a_mixture_of_experts() -> None:
    model = Model(placement([0, 1]), 2, 2)
    assert isinstance(model, MixtureOfExperts)
    assert is_mixture_of_experts(model)
    assert not is_mixture_of_experts(Model(np.zeros((0, 2), dtype=np.int32), 2, 2))
    assert not is_mixture_of_experts(ThreadMember(ThreadGroup([0]), 0))
