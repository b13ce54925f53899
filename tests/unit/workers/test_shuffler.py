"""Experts that move between steps: whole, bit for bit, in all plans, and at whatever moment they are given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import CancelStage, Shuffle, StageExperts
from drumline.workers.experts.expert_layer import canary_of
from tests.unit.workers.staged_worlds import LAYERS, StagedWorld, distinct_placement, is_expert

WORLDS: tuple[tuple[tuple[int, ...], int], ...] = (((4, 4), 6), ((5, 3), 5), ((2, 4, 3), 6), ((2, 3, 2, 4), 7))
FEW = (WORLDS[1], WORLDS[3])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int32(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


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


# -------------------------------------------------------------------------------------------------- what is refused


def order(world: StagedWorld, **changes: Any) -> StageExperts:
    """Rank 0's slot 0 gets the expert of rank 1's slot 0, in layer 0."""
    placement = world.placement[0].copy()
    placement[0] = placement[world.starts[1]]
    plain = StageExperts(1, 1, 1, 0, placement, np.array([[0, 0, 1, 0]], dtype=np.int32), int32(0, 1))
    return msgspec.structs.replace(plain, **changes)


def refused_world() -> StagedWorld:
    """Experts 0 and 5 on both ranks, so that either may go."""
    world = StagedWorld(0, (4, 4), 6)
    for number in range(LAYERS):
        world.placement[number] = [0, 1, 2, 5, 3, 4, 5, 0]
    world.layers = [world._layers(rank) for rank in (0, 1)]
    world.shufflers = [type(world.shufflers[0])(layers, 6, rank) for rank, layers in enumerate(world.layers)]
    world.open()
    return world


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 7, "fetches": np.array([[7, 0, 1, 0]], dtype=np.int32)}, "of MoE layer 7; this rank's stage"),
    "other layer": ({"fetches": np.array([[1, 0, 1, 0]], dtype=np.int32)}, "moves of other layers"),
    "checkpoint": ({"fetches": np.array([[0, 0, -1, 0]], dtype=np.int32)}, "or from the checkpoint"),
    "slot": ({"fetches": np.array([[0, 8, 1, 0]], dtype=np.int32)}, "slot 8 from slot 0 of rank 1; valid: slots below"),
    "rank": ({"fetches": np.array([[0, 0, 2, 0]], dtype=np.int32)}, r"of rank 2; valid: slots below 8, ranks \[0, 1\]"),
    "rounds": ({"rounds": int32(0, 2)}, r"rounds \[0, 2\] do not share out 1 moves"),
    "no rounds": ({"rounds": int32()}, r"rounds \[\] do not share out"),
    "parts": ({"parts": 0}, "in 0 parts; valid: 1 to 144"),
    "many parts": ({"parts": 145}, "in 145 parts; valid: 1 to 144, and a generation after 0"),
    "expert": ({"placement": int32(6, 1, 2, 5, 3, 4, 5, 0)}, "found expert 6 in slot 0"),
    "slots": ({"placement": int32(3, 1, 2, 5, 4, 5, 0)}, "numbers from 0 that add up to 7"),
    "nothing brings it": ({"placement": int32(3, 1, 2, 4, 3, 4, 5, 0)}, "its moves do not make it"),
    "twice": (
        {"fetches": np.array([[0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.int32), "rounds": int32(0, 1, 2)},
        "2 experts come to 1 slots",
    ),
    "source": (
        {
            "placement": int32(0, 1, 2, 5, 2, 4, 5, 3),
            "fetches": np.array([[0, 4, 0, 1], [0, 7, 1, 0]], dtype=np.int32),
            "rounds": int32(0, 2),
        },
        "slot 1 does not hold expert 2",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_order_that_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    changes, text = ROWS[name]
    world = refused_world()
    shuffler = world.shufflers[0]
    with pytest.raises(ProtocolError, match=text):
        shuffler.stage(order(world, **changes))
    assert not any(shuffler.moves(layer) for layer in world.layers[0])
    world.check_all()
    assert shuffler.stage(order(world))


def test_orders_come_once_and_in_order() -> None:
    world = refused_world()
    shuffler = world.shufflers[0]
    assert shuffler.stage(order(world, generation=5))
    assert not shuffler.stage(order(world, generation=5))
    with pytest.raises(ProtocolError, match="generation 6 found 5 under way"):
        shuffler.stage(order(world, generation=6))
    with pytest.raises(ProtocolError, match="generation 4 found after 5"):
        shuffler.stage(order(world, generation=4))
    assert shuffler.cancel(CancelStage(1, 1, 5))
    staged = shuffler.poll(1, 1)
    assert staged is not None
    assert (staged.generation, staged.dropped, staged.bytes_received) == (5, True, 0)
    assert not shuffler.cancel(CancelStage(1, 1, 5))
    with pytest.raises(ProtocolError, match="generation 4 is not under way; valid: none"):
        shuffler.cancel(CancelStage(1, 1, 4))


STEPS: tuple[tuple[Shuffle, str], ...] = (
    (Shuffle(2, first=0, end=1), "generation 2 is not under way; valid: 1"),
    (Shuffle(1, first=1, end=2), "parts 1 to 2 of generation 1; valid: from 0, to 1"),
    (Shuffle(1, first=0, end=2), "parts 0 to 2"),
    (Shuffle(1, commit=True), "to be committed and is not whole"),
    (Shuffle(1, home_first=0, home_end=1), "are not to go home now"),
)


@pytest.mark.parametrize(("shuffle", "text"), STEPS)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(shuffle: Shuffle, text: str) -> None:
    world = refused_world()
    world.shufflers[0].stage(order(world))
    with pytest.raises(ProtocolError, match=text):
        world.shufflers[0].begin_step(shuffle, world.points.append)
    world.check_rank(0)
    assert world.points == []


def test_a_commit_comes_once_and_what_is_committed_cannot_be_given_up() -> None:
    world = refused_world()
    rank0, rank1 = world.shufflers
    for shuffler in (rank0, rank1):
        shuffler.stage(order(world))
        shuffler.begin_step(Shuffle(1, first=0, end=1), world.points.append)
    said: set[int] = set()
    for _ in range(100):
        said |= {rank for rank, shuffler in enumerate((rank0, rank1)) if shuffler.poll(1, 1) is not None}
    assert said == {0, 1}
    rank0.begin_step(Shuffle(1, commit=True), world.points.append)
    assert world.layers[0][0].held.tolist() == [3, 1, 2, 5]
    for refused in (Shuffle(1, commit=True), Shuffle(1, home_first=0, home_end=2), Shuffle(1, first=0, end=1)):
        with pytest.raises(ProtocolError):
            rank0.begin_step(refused, world.points.append)
    with pytest.raises(ProtocolError, match="to be cancelled and is committed"):
        rank0.cancel(CancelStage(1, 1, 1))
    rank0.begin_step(Shuffle(1, home_first=0, home_end=1), world.points.append)
    world.check_rank(0)
    with pytest.raises(ProtocolError, match="generation 1 is not under way"):
        rank0.begin_step(Shuffle(1, home_first=1, home_end=1), world.points.append)


def test_an_expert_that_is_not_the_one_that_was_ordered_is_known_by_its_canary() -> None:
    world = refused_world()
    # The sender believes that its slot 0 holds expert 3; what came into it is another.
    world.layers[1][0].canary[0] = canary_of(0, 4)
    for shuffler in world.shufflers:
        shuffler.stage(order(world))
        shuffler.begin_step(Shuffle(1, first=0, end=1), world.points.append)
    with pytest.raises(ProtocolError, match="canary 4 came for slot 0 of MoE layer 0; expected 3"):
        poll_often(world)
    assert world.shufflers[0].spares(world.layers[0][0]) == []


def poll_often(world: StagedWorld) -> None:
    for _ in range(100):
        world.shufflers[0].poll(1, 1)


def test_a_rank_between_epochs_moves_nothing() -> None:
    world = refused_world()
    world.shufflers[0].close()
    with pytest.raises(ProtocolError, match="generation 1 found a rank that moves no experts"):
        world.shufflers[0].stage(order(world))
    assert world.shufflers[0].poll(1, 1) is None


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
