"""Experts that come into place, and refits that end in the middle: what a rank says it holds is what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.protocol.errors import DrumlineError, InvalidConfig, ProtocolError
from drumline.protocol.messages import I32, NO_FETCHES, NO_NUMBERS, I32Matrix
from drumline.workers.abort import EpochAborted
from drumline.workers.collectives import Group
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.reading import ExpertReader
from drumline.workers.groups import PeerLost
from drumline.workers.held_bytes import held_bytes
from drumline.workers.model_runner import ModelRunner
from tests.checkpoints import Checkpoints
from tests.parity.stepdriver import loaded_runner, worker_config
from tests.parity.threadgroup import ThreadGroup
from tests.parity.threadworld import ThreadWorld, nothing_new, on_each

EP2: dict[str, Any] = {"data_parallel_size": 2, "enable_expert_parallel": True}
OFF2: dict[str, Any] = {"data_parallel_size": 2}
LAYERS, EXPERTS = 3, 8


def int32(*rows: Sequence[int]) -> I32Matrix:
    return np.array(rows, dtype=np.int32)


def everywhere(slots: Sequence[int]) -> I32Matrix:
    """The same experts in every layer."""
    return np.tile(np.array(slots, dtype=np.int32), (LAYERS, 1))


@pytest.fixture
def world(checkpoints: Checkpoints) -> ThreadWorld:
    """Rank 0 holds experts 0 to 3 of every layer, rank 1 the others."""
    return ThreadWorld(checkpoints("qwen3-moe"), **EP2)


@pytest.fixture
def whole(checkpoints: Checkpoints) -> ModelRunner:
    """One rank with all experts, each in the slot of its number."""
    return loaded_runner(worker_config(checkpoints("qwen3-moe")))


def check_truth(runner: ModelRunner, whole: ModelRunner) -> None:
    """Every slot that is said to hold an expert holds it."""
    held = runner.held()
    for number, (mine, theirs) in enumerate(zip(runner.model.moe_layers, whole.model.moe_layers, strict=True)):
        for slot, expert in enumerate(held[number, : len(mine.experts.down)].tolist()):
            if expert >= 0:
                assert torch.equal(mine.experts.gate_up[slot], theirs.experts.gate_up[expert])
                assert torch.equal(mine.experts.down[slot], theirs.experts.down[expert])


def together(world: ThreadWorld, plan: tuple[I32Matrix, I32, I32Matrix], ranks: Sequence[int] = (0, 1)) -> None:
    group = ThreadGroup(ranks)

    def refit(rank: int) -> None:
        place = EpochPlace.of(world.layout, (0, 1), rank)
        world.runners[rank].refit(place, *plan, group.member(rank), nothing_new)

    on_each(ranks, refit)


# ------------------------------------------------------------------------------------------------ what comes from where


def test_ranks_swap_experts_and_every_copy_is_of_what_was_there_before(world: ThreadWorld, whole: ModelRunner) -> None:
    placement = everywhere([1, 0, 6, 7, 4, 3, 2, 5])
    rows = []
    for layer in range(LAYERS):
        # Slots 0 and 1 of rank 0 change places; 6 and 7 come from rank 1, which gets 3 and 2 for them, and moves 5.
        rows += [(layer, 0, 0, 1), (layer, 1, 0, 0), (layer, 2, 1, 2), (layer, 3, 1, 3)]
        rows += [(layer, 5, 0, 3), (layer, 6, 0, 2), (layer, 7, 1, 1)]
    together(world, (placement, NO_NUMBERS, int32(*rows)))
    for rank, runner in world.runners.items():
        np.testing.assert_array_equal(runner.held(), placement[:, 4 * rank : 4 * rank + 4])
        check_truth(runner, whole)


def test_a_second_copy_is_taken_from_the_first_wherever_that_came_from(world: ThreadWorld, whole: ModelRunner) -> None:
    placement = everywhere([0, 1, 2, 3, 7, 7, 5, 5, 4, 5, 6, 7])
    rows = []
    for layer in range(LAYERS):
        rows += [(layer, 4, 1, 3), (layer, 5, 0, 4), (layer, 6, -1, 0), (layer, 7, 0, 6)]
    together(world, (placement, np.array([8, 4], dtype=np.int32), int32(*rows)))
    assert world.runners[0].held().tolist() == [[0, 1, 2, 3, 7, 7, 5, 5]] * LAYERS
    check_truth(world.runners[0], whole)


def test_growth_and_shrinking_change_the_bytes_that_are_held_and_nothing_else(
    world: ThreadWorld, whole: ModelRunner
) -> None:
    runner = world.runners[0]
    before = held_bytes(runner.model)
    one = whole.model.moe_layers[0].experts.gate_up[0].nbytes + whole.model.moe_layers[0].experts.down[0].nbytes
    world.epoch((0,)).close()
    check_truth(runner, whole)
    assert held_bytes(runner.model) == before + LAYERS * 4 * one == held_bytes(whole.model)
    assert runner.expert_load.shape == (LAYERS, 8)
    world.start(1)
    world.epoch((0, 1)).close()
    assert held_bytes(runner.model) == before
    assert runner.held().tolist() == [[0, 1, 2, 3]] * LAYERS


def test_a_slot_that_gets_another_expert_counts_its_tokens_from_zero(world: ThreadWorld) -> None:
    runner = world.runners[0]
    for layer in runner.model.moe_layers:
        layer.experts.load += 5
    world.epoch((0,)).close()
    assert runner.expert_load.tolist() == [[5, 5, 5, 5, 0, 0, 0, 0]] * LAYERS


@pytest.mark.parametrize("sizes", [EP2, OFF2], ids=["whole", "channels"])
def test_the_same_placement_again_reads_and_moves_nothing(checkpoints: Checkpoints, sizes: dict[str, Any]) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), **sizes)
    world.epoch((0,)).close()
    (runner,) = world.runners.values()
    memory = [layer.experts.gate_up.data_ptr() for layer in runner.model.moe_layers]
    with mock.patch.object(ExpertReader, "read", side_effect=AssertionError("the checkpoint is read")):
        world.epoch((0,)).close()
    assert [layer.experts.gate_up.data_ptr() for layer in runner.model.moe_layers] == memory
    assert not len(world.plan[2])


def test_a_parked_rank_gives_what_others_need_and_keeps_what_it_has(world: ThreadWorld, whole: ModelRunner) -> None:
    parked = world.runners[1]
    parked.refit(EpochPlace.of(world.layout, (0,), 1), everywhere(range(8)), NO_NUMBERS, NO_FETCHES, None, nothing_new)
    world.epoch((0,), parked=(1,)).close()
    assert set(world.plan[2][:, 2].tolist()) == {1}
    assert world.runners[0].held().tolist() == [list(range(8))] * LAYERS
    assert parked.held().tolist() == [[4, 5, 6, 7]] * LAYERS
    check_truth(parked, whole)


def test_ranks_of_one_stage_that_give_each_other_experts_meet_and_no_others(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), pipeline_parallel_size=2, **EP2)
    for parked, stages in ((), ([], [])), ((2, 3), ([0, 2], [1, 3])):
        plan = world.planned((0, 1), parked)
        assert len(plan[2])
        for rank in (0, 1, *parked):
            place = EpochPlace.of(world.layout, (0, 1), rank)
            assert sorted(world.runners[rank].experts.moving_ranks(place, *plan)) == stages[rank % 2]


# --------------------------------------------------------------------------------------------- what ends in the middle


@dataclass
class Limit:
    """Says at the call after the ``left``-th that a newer epoch has been ordered."""

    left: int

    def __call__(self) -> None:
        if self.left <= 0:
            raise EpochAborted("epoch (1, 2) is over: the test says so")
        self.left -= 1


def alone(world: ThreadWorld, check: Callable[[], None]) -> None:
    plan = world.planned((0,))
    world.runners[0].refit(EpochPlace.of(world.layout, (0,), 0), *plan, None, check)


def calls(world: ThreadWorld, runner: ModelRunner) -> int:
    """How often a whole refit asks whether it is still wanted."""
    limit = Limit(10_000)
    alone(world, limit)
    return 10_000 - limit.left


def test_a_refit_that_is_aborted_anywhere_says_what_it_has_and_is_completed_by_the_next(
    world: ThreadWorld, whole: ModelRunner
) -> None:
    runner = world.runners[0]
    needed = calls(world, runner)
    assert needed > LAYERS * 4
    seen = set()
    for allowed in range(0, needed, 5):
        world.start(0)
        runner = world.runners[0]
        with pytest.raises(EpochAborted):
            alone(world, Limit(allowed))
        check_truth(runner, whole)
        seen.add(int((runner.held() >= 0).sum()))
        alone(world, nothing_new)
        assert sorted(runner.held()[0].tolist()) == list(range(8))
        check_truth(runner, whole)
    assert len(seen) > LAYERS


def test_a_refit_that_is_aborted_again_and_again_comes_to_its_end(world: ThreadWorld, whole: ModelRunner) -> None:
    for _ in range(100):
        try:
            alone(world, Limit(6))
        except EpochAborted:
            check_truth(world.runners[0], whole)
        else:
            break
    assert (np.sort(world.runners[0].held()) == np.arange(8)).all()


def test_channels_that_are_cut_anew_in_some_layers_only_are_cut_right_by_the_next_refit(
    checkpoints: Checkpoints, whole: ModelRunner
) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), **OFF2)
    needed = calls(world, world.runners[0])
    plan = world.planned((0,))
    recut = set()
    for allowed in range(1, needed, 9):
        world.start(0)
        runner = world.runners[0]
        before = cut(runner)
        with pytest.raises(EpochAborted):
            alone(world, Limit(allowed))
        recut.add(sum(one.shape != other.shape for one, other in zip(cut(runner), before, strict=True)) // 2)
        # Back to where it came from, although some layers have all channels by now.
        runner.refit(EpochPlace.of(world.layout, (0, 1), 0), *plan, None, nothing_new)
        assert all(torch.equal(one, other) for one, other in zip(cut(runner), before, strict=True))
        alone(world, nothing_new)
        assert all(torch.equal(one, other) for one, other in zip(cut(runner), cut(whole), strict=True))
        assert not any(layer.sharded for layer in runner.model.moe_layers)
    assert recut == set(range(LAYERS))


def cut(runner: ModelRunner) -> list[Tensor]:
    """The experts' weights of all layers."""
    return [part for layer in runner.model.moe_layers for part in (layer.experts.gate_up, layer.experts.down)]


class Broken:
    """A group in which the peer is lost with the message after the ``left``-th that is waited for."""

    def __init__(self, group: Group, left: int) -> None:
        self.ranks, self._group, self.left = group.ranks, group, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> Any:
        return _LostReceive(self, self._group.irecv(shape, dtype, src))


@dataclass
class _LostReceive:
    group: Broken
    receive: Any

    def wait(self) -> Tensor:
        if self.group.left <= 0:
            raise PeerLost("rank 1 is gone")
        self.group.left -= 1
        tensor: Tensor = self.receive.wait()
        return tensor


@pytest.mark.parametrize("messages", [0, 1, 3, 4, 5, 11])
def test_a_peer_that_is_lost_while_it_sends_leaves_no_slot_half_filled(
    messages: int, world: ThreadWorld, whole: ModelRunner
) -> None:
    placement = everywhere([4, 1, 2, 5, 0, 3, 6, 7])
    rows = int32(*[r for n in range(LAYERS) for r in ((n, 0, 1, 0), (n, 3, 1, 1), (n, 4, 0, 0), (n, 5, 0, 3))])
    group, runner = ThreadGroup((0, 1)), world.runners[0]
    for layer in world.runners[1].model.moe_layers:
        for slot in (0, 1):
            for part in (layer.experts.gate_up, layer.experts.down):
                group.member(1).isend(part[slot], 0)
    broken: Any = Broken(group.member(0), messages)
    with pytest.raises(PeerLost):
        runner.refit(EpochPlace.of(world.layout, (0, 1), 0), placement, NO_NUMBERS, rows, broken, nothing_new)
    check_truth(runner, whole)
    done = messages // 4
    assert runner.held().tolist() == [[4, 1, 2, 5]] * done + [[0, 1, 2, 3]] * (LAYERS - done)
    alone(world, nothing_new)
    check_truth(runner, whole)


def test_a_checkpoint_that_is_gone_leaves_the_slot_empty(world: ThreadWorld, whole: ModelRunner) -> None:
    runner = world.runners[0]
    with (
        mock.patch("drumline.workers.loading.Path.open", side_effect=OSError("no such file")),
        pytest.raises(InvalidConfig, match="no such file"),
    ):
        alone(world, nothing_new)
    assert runner.held()[0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    alone(world, nothing_new)
    check_truth(runner, whole)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("placement", "slots", "fetched", "error", "text"),
    [
        ([0, 1, 2, 4, 3, 5, 6, 7], (), [], ProtocolError, "nothing brings expert 4 into slot 3 of MoE layer 0"),
        ([0, 1, 2, 4, 3, 5, 6, 7], (), [(0, 4, 0, 2)], ProtocolError, "slot 2 of MoE layer 0 does not hold 3"),
        (range(8), (), [(3, 0, -1, 0)], ProtocolError, "slot 0 of MoE layer 3; valid: layers below 3"),
        (range(8), (), [(0, 8, -1, 0)], ProtocolError, "slot 8 of MoE layer 0; valid: layers below 3, slots below 8"),
        (range(8), (), [(0, 0, -2, 0)], ProtocolError, "from slot 0 of rank -2"),
        (range(8), (5, 4), [], InvalidConfig, "2 numbers from 0 that add up to 8"),
        (range(7), (), [], InvalidConfig, "no slot for expert 7"),
        ([4, 1, 2, 3, 0, 5, 6, 7], (), [(0, 0, 1, 0)], ProtocolError, "nothing brings"),
    ],
)
def test_orders_that_do_not_add_up_change_nothing(
    placement: Sequence[int],
    slots: Sequence[int],
    fetched: list[tuple[int, int, int, int]],
    error: type[DrumlineError],
    text: str,
    world: ThreadWorld,
) -> None:
    runner, place = world.runners[0], EpochPlace.of(world.layout, (0, 1), 0)
    rows = int32(*fetched) if fetched else NO_FETCHES
    with pytest.raises(error, match=text):
        runner.refit(place, everywhere(placement), np.array(slots, dtype=np.int32), rows, None, nothing_new)
    assert runner.held().tolist() == [[0, 1, 2, 3]] * LAYERS


def test_experts_that_travel_need_a_group(world: ThreadWorld) -> None:
    place = EpochPlace.of(world.layout, (0, 1), 0)
    rows = int32(*[row for n in range(LAYERS) for row in ((n, 0, 1, 0), (n, 4, 0, 0))])
    with pytest.raises(ProtocolError, match="from rank 1 to rank 0, and they have no group"):
        world.runners[0].refit(place, everywhere([4, 1, 2, 3, 0, 5, 6, 7]), NO_NUMBERS, rows, None, nothing_new)


def test_without_expert_parallel_no_slot_changes(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), **OFF2)
    place = EpochPlace.of(world.layout, (0, 1), 0)
    assert world.runners[0].held().shape == (0, 0)
    with pytest.raises(ProtocolError, match="the slots of MoE layer 0 cannot change"):
        world.runners[0].refit(place, everywhere(range(7, -1, -1)), NO_NUMBERS, NO_FETCHES, None, nothing_new)


def test_a_placement_of_another_number_of_layers_is_refused(world: ThreadWorld) -> None:
    place = EpochPlace.of(world.layout, (0, 1), 0)
    with pytest.raises(ProtocolError, match="a placement of 2 layers; the model has 3"):
        world.runners[0].refit(place, everywhere(range(8))[:2], NO_NUMBERS, NO_FETCHES, None, nothing_new)
