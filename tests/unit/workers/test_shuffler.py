"""Experts that move between steps: whole, bit for bit, in all plans, and at whatever moment they are given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from drumline.workers.experts import staged_layer
from drumline.workers.experts.parts import cut_part
from tests.unit.workers.staged_worlds import LAYERS, StagedWorld, distinct_placement, is_expert

WORLDS: tuple[tuple[tuple[int, ...], int], ...] = (((4, 4), 6), ((5, 3), 5), ((2, 4, 3), 6), ((2, 3, 2, 4), 7))
FEW = (WORLDS[1], WORLDS[3])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("slots", "experts", "dtype"),
    [(*world, dtype) for world, dtype in zip(WORLDS, (*DTYPES, torch.float32), strict=True)],
)
def test_every_plan_puts_every_expert_in_its_slot_and_moves_the_fewest_bytes(
    slots: tuple[int, ...], experts: int, dtype: torch.dtype
) -> None:
    for seed in range(3):
        world = StagedWorld(seed, slots, experts, dtype)
        for _ in range(3):
            before = world.placement.copy()
            target = distinct_placement(world.draw, slots, experts)
            parts, per_step = (int(one) for one in world.draw.integers(1, 4, 2))
            run = world.run_to(target, parts, per_step)
            world.finish(run)
            world.check_all()
            assert (world.placement == target).all()
            assert run.moved.bytes == world.least_bytes(before, target)


def test_steps_before_the_commit_compute_with_what_was_there_and_those_after_it_with_what_has_come() -> None:
    world = StagedWorld(1, (4, 4), 6)
    before = world.placement.copy()
    run = world.run_to(distinct_placement(world.draw, (4, 4), 6), parts=3)
    while "commit" not in world.points:
        held = [[layer.held.tolist() for layer in layers] for layers in world.layers]
        world.run_step(run)
    assert held == [[world.own(before[layer], rank) for layer in range(LAYERS)] for rank in (0, 1)]
    assert world.points.index("commit") > world.points.index("staging") == 0
    assert (world.placement != before).any()
    world.finish(run)
    world.check_all()


@pytest.mark.parametrize(("slots", "experts"), FEW)
def test_a_plan_may_be_given_up_in_any_step_and_the_next_one_starts_from_what_is(
    slots: tuple[int, ...], experts: int
) -> None:
    phases = set()
    for seed in range(10):
        world = StagedWorld(seed, slots, experts)
        run = world.run_to(distinct_placement(world.draw, slots, experts), parts=2)
        before = world.placement.copy()
        for _ in range(int(world.draw.integers(0, 40))):
            world.run_step(run)
        if run.over:
            continue
        run.cancel("the test says so", 0.0)
        world.deliver(run)
        world.finish(run)
        phases.add((run.moved.layers, (world.placement == before).all()))
        world.check_all()
        target = distinct_placement(world.draw, slots, experts)
        world.finish(world.run_to(target))
        assert (world.placement == target).all()
        world.check_all()
    assert {moved for moved, _ in phases} >= {0, 1}


@pytest.mark.parametrize(("slots", "experts"), FEW)
def test_after_a_death_in_any_phase_either_generation_is_whole_and_what_is_spare_is_what_it_is_said_to_be(
    slots: tuple[int, ...], experts: int
) -> None:
    seen = set()
    for seed in range(16):
        world = StagedWorld(seed, slots, experts)
        before, target = world.placement.copy(), distinct_placement(world.draw, slots, experts)
        run = world.run_to(target, parts=2)
        for _ in range(int(world.draw.integers(1, 40))):
            world.run_step(run)
        if run.over:
            continue
        half_step(world, run)
        for rank, shuffler in enumerate(world.shufflers):
            shuffler.close()
            world.check_rank(rank)
        for number in range(LAYERS):
            seen.add(state_after_death(world, number, before, target))
        for rank, shuffler in enumerate(world.shufflers):
            shuffler.forget()
            world.check_rank(rank)
            assert all(not shuffler.spares(layer) and not shuffler.moves(layer) for layer in world.layers[rank])
    assert seen >= {"old", "new", "both"}


def half_step(world: StagedWorld, run: Any) -> None:
    """What comes next is begun by some of the ranks alone."""
    shuffle, _ = run.next(world.step, 0.0)
    if shuffle is not None:
        for shuffler in world.shufflers[: int(world.draw.integers(0, len(world.shufflers)))]:
            shuffler.begin_step(shuffle, world.points.append)


def state_after_death(world: StagedWorld, number: int, before: Any, target: Any) -> str:
    """Which placement of layer ``number`` is there as a whole, in slots and outside of them."""
    has_old = has_new = True
    for rank, layers in enumerate(world.layers):
        layer = layers[number]
        spares = world.shufflers[rank].spares(layer)
        for expert, weights in spares:
            assert is_expert(weights, number, expert)
        here = {*layer.held.tolist(), *(expert for expert, _ in spares)}
        has_old &= here >= set(world.own(before[number], rank))
        has_new &= here >= set(world.own(target[number], rank))
    assert has_old or has_new
    return "both" if has_old and has_new else "old" if has_old else "new"


def test_tokens_are_reported_by_slot_and_begin_anew_with_a_new_expert() -> None:
    world = StagedWorld(3, (4, 4), 6)
    shuffler, layers = world.shufflers[0], world.layers[0]
    counts = torch.arange(4)
    for layer in layers:
        layer.moe.experts.load += counts
    shuffler.load.count_step()
    found, steps = shuffler.load.take()
    assert (found.tolist(), steps) == ([[0, 1, 2, 3]] * LAYERS, 1)
    assert found.dtype == np.int32
    run = world.run_to(distinct_placement(world.draw, (4, 4), 6))
    while "commit" not in world.points:
        for layer in layers:
            layer.moe.experts.load += counts
        shuffler.load.count_step()
        world.run_step(run)
    # The report of the step that commits is taken before the commit; here it has not been: new slots say nothing twice.
    found, _ = shuffler.load.take()
    assert found.min() >= 0
    assert shuffler.load.take()[0].any() == np.bool_(False)
    for layer in layers:
        layer.moe.experts.load += counts
    assert shuffler.load.take()[0].tolist() == [[0, 1, 2, 3]] * LAYERS


def test_more_tokens_than_travel_are_told_as_the_most_that_do() -> None:
    world = StagedWorld(3, (4, 4), 6)
    world.layers[0][0].moe.experts.load += torch.tensor([1 << 31, (1 << 31) - 1, 1 << 40, 7])
    assert world.shufflers[0].load.take()[0][0].tolist() == [(1 << 31) - 1] * 3 + [7]
    assert not world.shufflers[0].load.take()[0].any()


def test_what_waits_for_room_is_not_copied_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []

    def counted(weights: Any, parts: int, part: int, canary: int) -> torch.Tensor:
        cut.append(part)
        return cut_part(weights, parts, part, canary)

    monkeypatch.setattr(staged_layer, "cut_part", counted)
    world = StagedWorld(3, (3, 3), 6)
    world.office.room = 0
    target = world.placement.copy()
    target[:, [0, 3]] = target[:, [3, 0]]
    run = world.run_to(target, parts=3)
    for _ in range(4):
        world.run_step(run)
    assert cut == []
    world.office.room = 2
    world.finish(run)
    assert len(cut) == 3 * 2 * LAYERS
    world.check_all()


def test_what_was_counted_in_an_epoch_before_is_not_told() -> None:
    world = StagedWorld(3, (4, 4), 6)
    world.layers[1][0].moe.experts.load += 5
    world.shufflers[1].load.count_step()
    world.open()
    found, steps = world.shufflers[1].load.take()
    assert (int(found.sum()), steps) == (0, 0)


def test_buffers_are_as_many_as_a_rank_has_slots_and_grow_with_them() -> None:
    world = StagedWorld(3, (4, 3), 6)
    shuffler = world.shufflers[0]
    assert shuffler.pool is not None
    assert (shuffler.pool.size, shuffler.pool.nbytes) == (4, 4 * (2 * 3 * 4 + 4 * 3) * 4)
    for layer in world.layers[0]:
        layer.resize(6)
    shuffler.open(world.epochs[0], (6, 3), (), world.office.member(0))
    assert shuffler.pool.size == 6
    for layer in world.layers[0]:
        layer.resize(2)
    shuffler.open(world.epochs[0], (2, 3), (), world.office.member(0))
    assert shuffler.pool.size == 6


@pytest.mark.parametrize("slots", [(4, 4), (3, 5)])
def test_a_rank_that_has_no_move_in_a_layer_is_staged_with_the_last_part(slots: Sequence[int]) -> None:
    world = StagedWorld(2, (*slots, 2), 6)
    target = world.placement.copy()
    first = world.own(target[0], 0)
    lacking = next(one for one in world.own(target[0], 1) if one not in first)
    copies = {one: int((target[0] == one).sum()) for one in first}
    target[0, first.index(max(copies, key=lambda one: copies[one]))] = lacking
    assert max(copies.values()) > 1
    run = world.run_to(target, parts=2)
    assert not world.shufflers[2].pending
    world.run_step(run)
    assert not world.shufflers[2].pending
    world.finish(run)
    world.check_all()
    assert (world.placement == target).all()
