"""Experts that move while ranks compute: every token is what transformers says, and a death takes nothing along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drumline.protocol.messages import NO_FETCHES, I32Matrix
from drumline.workers.experts.expert_layer import canary_of
from drumline.workers.held_bytes import held_bytes
from drumline.workers.model_runner import ModelRunner
from tests.checkpoints import WIDE_VOCAB_SIZE, Checkpoints
from tests.parity.oracle import Oracle, relative_error
from tests.parity.rows import Stream
from tests.parity.stagedthreads import StagedThreads
from tests.parity.stepdriver import StepDriver, loaded_runner, worker_config
from tests.parity.test_one_rank import TOLERANCE, mixed_streams


def turned(world: StagedThreads, by: int) -> I32Matrix:
    """Each slot holds the expert that another one held, none of them twice on a rank."""
    target = (world.placement + by) % world.spec.num_experts
    return target.astype(np.int32)


def check_truth(world: StagedThreads, whole: ModelRunner) -> None:
    """Every slot computes with the expert that it is said to hold, and says so."""
    bounds = np.cumsum([0, *world.slots])
    for place, rank in enumerate(world.members):
        for layer, its in zip(world.runners[rank].experts.layers, whole.model.moe_layers, strict=True):
            mine = world.placement[layer.number, bounds[place] : bounds[place + 1]]
            assert layer.held.tolist() == mine.tolist()
            for slot, expert in enumerate(layer.held.tolist()):
                gate_up, down = layer.weights(slot)
                assert torch.equal(gate_up, its.experts.gate_up[expert])
                assert torch.equal(down, its.experts.down[expert])
                assert layer.canary[slot] == canary_of(layer.number, expert)


def judge(checkpoint: object, streams: list[Stream]) -> None:
    oracle, worst = Oracle(checkpoint), 0.0  # type: ignore[arg-type]
    for stream in streams:
        assert oracle.judge(stream.prompt, stream.generated).equal
        expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
        worst = max(worst, relative_error(torch.stack(stream.logits), expected))
    assert worst < TOLERANCE


def enter(driver: StepDriver, streams: list[list[Stream]]) -> None:
    """Streams that wait for the steps to come."""
    for replica, its in zip(driver.replicas, streams, strict=True):
        replica.waiting.extend(its)


def shared_out(driver: StepDriver, streams: list[Stream]) -> list[list[Stream]]:
    return [streams[place :: len(driver.replicas)] for place in range(len(driver.replicas))]


@pytest.mark.parametrize(("ranks", "redundant"), [(2, 3), (3, 0)])
def test_tokens_are_the_same_while_experts_move_again_and_again(
    ranks: int, redundant: int, checkpoints: Checkpoints
) -> None:
    folder = checkpoints("qwen3-moe-wide")
    world = StagedThreads(folder, ranks, redundant)
    driver = world.epoch(world.placement, NO_FETCHES, world.slots, range(ranks))
    streams = mixed_streams(seed=4, max_tokens=70, vocab_size=WIDE_VOCAB_SIZE)[:6]
    enter(driver, shared_out(driver, streams))
    plans = 0
    while any(replica.unfinished for replica in driver.replicas):
        if world.resting:
            world.move_to(turned(world, 3), parts=1 + plans % 3)
            plans += 1
        world.steps(driver, 5)
    driver.close()
    assert world.committed > 2 * world.num_layers
    check_truth(world, loaded_runner(worker_config(folder)))
    judge(folder, streams)


@pytest.mark.parametrize("steps", [2, 3, 6, 8, 11])
def test_a_death_while_experts_move_leaves_what_was_staged_or_replaced_to_be_copied_from(
    steps: int, checkpoints: Checkpoints
) -> None:
    folder = checkpoints("qwen3-moe")
    whole = loaded_runner(worker_config(folder))
    world = StagedThreads(folder, 3, 4)
    driver = world.epoch(world.placement, NO_FETCHES, world.slots, range(3))
    streams = mixed_streams(seed=2, max_tokens=60)[:3]
    before = world.placement.copy()
    world.move_to(turned(world, 5), parts=1)
    enter(driver, shared_out(driver, streams))
    world.steps(driver, steps)
    driver.close()
    held = world.leave(0, 2)
    assert any(spare.shape[1] for _, spare in held.values())
    for rank, (_, spare) in held.items():
        check_spares(world.runners[rank], spare, whole)
    # Rank 1 is gone; two ranks with eight slots each hold all experts, those of the first placement at first.
    wanted = np.array([[*row[:4], *range(4), *row[8:12], *range(4, 8)] for row in before], dtype=np.int32)
    todo = world.fetched(held, wanted, (8, 8))
    spares = sum(int(slot) >= held[int(rank)][0].shape[1] for _, _, rank, slot in todo.tolist() if rank >= 0)
    world.epoch(wanted, todo, (8, 8), (0, 2)).close()
    check_truth(world, whole)
    for runner in (world.runners[0], world.runners[2]):
        assert runner.experts.num_spare == 0
        assert runner.held().shape[1] == 8
    print(f"{spares} of {len(todo)} experts came from outside of slots")


def check_spares(runner: ModelRunner, spare: I32Matrix, whole: ModelRunner) -> None:
    """What is said to be spare is there, whole, where it is numbered."""
    for layer in runner.experts.layers:
        for number, expert in enumerate(spare[layer.number].tolist()):
            if expert >= 0:
                gate_up, down = layer.source(layer.num_slots + number)
                assert torch.equal(gate_up, whole.model.moe_layers[layer.number].experts.gate_up[expert])
                assert torch.equal(down, whole.model.moe_layers[layer.number].experts.down[expert])


def changing_places(folder: Path) -> tuple[StagedThreads, StepDriver]:
    """Two ranks that are about to change places in the first layer, with a stream to compute."""
    world = StagedThreads(folder, 2, 0)
    driver = world.epoch(world.placement, NO_FETCHES, world.slots, (0, 1))
    target = world.placement.copy()
    target[0] = [4, 5, 6, 7, 0, 1, 2, 3]
    world.move_to(target, parts=1)
    enter(driver, [mixed_streams(seed=2, max_tokens=60)[:1], []])
    return world, driver


def test_an_expert_that_only_a_buffer_holds_is_copied_from_there(checkpoints: Checkpoints) -> None:
    """Rank 1 dies when its experts have come to rank 0's buffers: none is read again."""
    folder = checkpoints("qwen3-moe")
    world, driver = changing_places(folder)
    world.steps(driver, 1)
    driver.close()
    held = world.leave(0)
    assert held[0][1].tolist() == [[4, 5, 6, 7], [-1] * 4, [-1] * 4]
    wanted = np.array([list(range(8))] * 3, dtype=np.int32)
    todo = world.fetched(held, wanted, (8,))
    assert todo[todo[:, 0] == 0][:, 2].tolist() == [0] * 4
    assert todo[todo[:, 0] > 0][:, 2].tolist() == [-1] * 8
    world.epoch(wanted, todo, (8,), (0,)).close()
    check_truth(world, loaded_runner(worker_config(folder)))


def test_what_is_committed_and_not_home_is_put_into_its_slots_by_the_next_epoch(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe")
    world, driver = changing_places(folder)
    world.steps(driver, 2)
    assert world.committed == 1
    driver.close()
    held = world.leave(0, 1)
    assert [spare[0].tolist() for _, spare in held.values()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not len(world.fetched(held, world.placement, world.slots))
    world.epoch(world.placement, NO_FETCHES, world.slots, (0, 1)).close()
    for rank in (0, 1):
        layer = world.runners[rank].experts.layers[0]
        assert layer.weights(0)[0].data_ptr() == layer.row(0)[0].data_ptr()
    check_truth(world, loaded_runner(worker_config(folder)))


def test_buffers_are_memory_of_their_own_that_counts_as_no_weight(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe")
    sizes = {"data_parallel_size": 2, "enable_expert_parallel": True}
    with_buffers, without = (
        loaded_runner(worker_config(folder, enable_eplb=moves, **sizes)) for moves in (True, False)
    )
    assert without.experts.shuffler is None
    shuffler = with_buffers.experts.shuffler
    assert shuffler is not None
    assert shuffler.pool is not None
    layer = with_buffers.model.moe_layers[0].experts
    assert shuffler.pool.nbytes == layer.gate_up.nbytes + layer.down.nbytes
    assert held_bytes(with_buffers.model) == held_bytes(without.model)
