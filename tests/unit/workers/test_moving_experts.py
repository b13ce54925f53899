"""A rank's main thread and the experts that move beside its steps: what counts, what is told and when."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import CancelStage, Shuffle, Staged, StageExperts, Step
from drumline.workers.experts.staging_pool import StagingPool
from drumline.workers.fence import Fence
from drumline.workers.moving_experts import MovingExperts
from tests.integration.workers.processes import step, worker_config
from tests.unit.workers.staged_worlds import LAYERS, StagedWorld

CONFIG = msgspec.structs.replace(worker_config("m"), enable_eplb=True, load_interval=4)


class Rank:
    """Rank 0 of a world of two, in epoch (1, 1). ``sent``: what it told; ``points``: what fault injection was told."""

    def __init__(self) -> None:
        self.world = StagedWorld(0, (4, 4), 6)
        self.sent: list[Any] = []
        self.points: list[tuple[str, int]] = []
        self.fence = Fence()
        self.fence.enter(1, 1)
        control: Any = SimpleNamespace(send=self.sent.append)
        injector: Any = SimpleNamespace(reach=lambda point, step: self.points.append((point, step)))
        self.experts = MovingExperts(control, self.fence, injector)
        self.runner: Any = SimpleNamespace(experts=SimpleNamespace(shuffler=self.world.shufflers[0]))

    def order(self, epoch: int = 1, generation: int = 1) -> StageExperts:
        """Nothing is to be moved."""
        none = np.zeros((0, 4), dtype=np.int32)
        return StageExperts(1, epoch, generation, 0, self.world.placement[0], none, np.zeros(1, dtype=np.int32))

    def step(self, number: int, shuffle: Shuffle | None = None, tokens: int = 1) -> tuple[Any, int]:
        carrying: Step = msgspec.structs.replace(step(number, [tokens, 0]), shuffle=shuffle)
        for layer in self.world.layers[0]:
            layer.moe.experts.load += tokens
        return self.experts.before_step(carrying, self.runner, CONFIG)


def test_loads_are_told_every_few_steps_and_count_what_was_computed_before() -> None:
    rank = Rank()
    for layer in rank.world.layers[0]:
        layer.moe.experts.load -= 1  # the step that is about to run has computed nothing yet
    told = {number: rank.step(number, tokens=int(number != 2)) for number in range(9)}
    assert [number for number, (load, _) in told.items() if load.size] == [4, 8]
    # Of steps 0 to 3 one had no tokens.
    assert (told[4][0].tolist(), told[4][1]) == ([[3] * 4] * LAYERS, 3)
    assert (told[8][0].tolist(), told[8][1]) == ([[4] * 4] * LAYERS, 4)


def test_a_stage_is_told_of_once_and_its_commit_brings_a_report() -> None:
    rank = Rank()
    assert not rank.experts.awaits(rank.runner)
    rank.experts.stage(rank.order(), rank.runner)
    assert rank.experts.awaits(rank.runner)
    for _ in range(3):
        rank.experts.poll(rank.runner)
    assert [type(message) for message in rank.sent] == [Staged]
    assert not rank.experts.awaits(rank.runner)
    load, steps = rank.step(2, Shuffle(1, commit=True))
    assert (load.shape, steps) == ((LAYERS, 4), 0)
    assert rank.points == [("commit", 2)]
    assert [layer.generation for layer in rank.world.layers[0]] == [1, 0]


def test_orders_that_come_too_late_or_again_are_counted_and_change_nothing() -> None:
    rank = Rank()
    rank.experts.stage(rank.order(epoch=0), rank.runner)
    rank.experts.cancel(CancelStage(1, 0, 1), rank.runner)
    assert rank.fence.stale == 2
    rank.experts.stage(rank.order(), rank.runner)
    rank.experts.stage(rank.order(), rank.runner)
    assert rank.fence.stale == 3
    rank.experts.cancel(CancelStage(1, 1, 1), rank.runner)
    rank.experts.poll(rank.runner)
    rank.experts.cancel(CancelStage(1, 1, 1), rank.runner)
    assert rank.fence.stale == 4
    assert [message.dropped for message in rank.sent] == [True]
    rank.fence.break_epoch()
    rank.experts.stage(rank.order(generation=2), rank.runner)
    assert rank.fence.stale == 5
    assert not rank.experts.awaits(rank.runner)


def test_orders_of_an_epoch_that_was_never_configured_are_refused() -> None:
    rank = Rank()
    with pytest.raises(ProtocolError, match=r"epoch \(1, 2\) is not configured; in force: \(1, 1\)"):
        rank.experts.stage(rank.order(epoch=2), rank.runner)
    with pytest.raises(ProtocolError, match=r"epoch \(1, 2\) is not configured"):
        rank.experts.cancel(CancelStage(1, 2, 1), rank.runner)


def test_a_rank_whose_experts_do_not_move_says_so() -> None:
    rank = Rank()
    rank.runner = SimpleNamespace(experts=SimpleNamespace(shuffler=None))
    assert rank.step(4)[0].size == 0
    with pytest.raises(ProtocolError, match="step 5 found a rank whose experts do not move"):
        rank.step(5, Shuffle(1, first=0, end=1))
    with pytest.raises(ProtocolError, match="StageExperts found a rank whose experts do not move"):
        rank.experts.stage(rank.order(), rank.runner)
    with pytest.raises(ProtocolError, match="CancelStage found a rank whose experts do not move"):
        rank.experts.cancel(CancelStage(1, 1, 1), rank.runner)
    assert not rank.experts.awaits(None)


def test_the_memory_of_buffers_is_taken_when_they_are_made_not_when_they_are_used() -> None:
    like: Any = SimpleNamespace(
        moe=SimpleNamespace(experts=SimpleNamespace(gate_up=_virtual(2048, 1024), down=_virtual(1024, 1024)))
    )
    pool = StagingPool(8, like)
    assert pool.nbytes == 8 * 3 * (1 << 20) * 4
    assert all(_is_resident(tensor) for number in range(8) for tensor in pool.buffer(number))


def _virtual(rows: int, columns: int) -> Tensor:
    return torch.empty(1, rows, columns)


def _is_resident(tensor: Tensor) -> bool:
    """Whether every page that lies within the tensor is in memory."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE
    states = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), states) == 0
    return all(state & 1 for state in states)
