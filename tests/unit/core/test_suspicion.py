"""What deaths are laid at requests."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.decisions import FaultSeen
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.suspicion import Suspicion
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import SamplingSpec, Submit


def _core() -> EngineCore:
    config = CoreConfig(
        max_num_seqs=4,
        max_num_batched_tokens=32,
        block_size=4,
        max_model_len=64,
        vocab_size=100,
        attention_tensor_parallel_size=2,
    )
    core = EngineCore(config, [32], term=1, seed=0)
    core.open_epoch(0, 1, [0], [])
    for number in range(2):
        prompt = np.arange(4, dtype=np.int32)
        core.submit(1, Submit(number, f"r{number}", prompt, SamplingSpec(), max_tokens=20), 0.0)
    return core


def _death(rank: int, epoch: int) -> FaultSeen:
    error = ErrorInfo(kind="request_failed", text="SIGSEGV")
    return FaultSeen(rank, f"i{rank}", 0, epoch, 0, "exit", "SIGSEGV", True, (), error)


def test_a_death_that_takes_two_ranks_along_is_one_death() -> None:
    core, suspicion = _core(), Suspicion()
    assert core.plan(0.0)
    suspicion.fault(_death(0, 1), core, 0)
    suspicion.closed(0, 1, core.suspects(0))
    core.close_epoch(0, [0], 0.0)
    suspicion.fault(_death(1, 1), core, 0)
    assert not suspicion, "the second rank died of the same step"

    core.open_epoch(0, 2, [0], [])
    assert core.plan(0.0)
    suspicion.fault(_death(0, 2), core, 0)
    assert suspicion, "a second step that kills brings its requests under suspicion"
