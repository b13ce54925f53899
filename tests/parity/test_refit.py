"""Worlds that lose ranks and get them back: in every epoch, and over their ends, what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.checkpoints import WIDE_VOCAB_SIZE, Checkpoints
from tests.parity.oracle import Oracle, relative_error
from tests.parity.test_one_rank import TOLERANCE, mixed_streams
from tests.parity.threadworld import ThreadWorld

DP2 = {"data_parallel_size": 2}
DP4 = {"data_parallel_size": 4}
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP = {"enable_expert_parallel": True}


@dataclass(frozen=True)
class Epoch:
    """Who computes and who is parked. ``started``: ranks that are new processes. ``kept``: the attention replicas of
    the epoch before that are still there, to what they are now."""

    members: tuple[int, ...]
    parked: tuple[int, ...] = ()
    started: tuple[int, ...] = ()
    kept: tuple[tuple[int, int], ...] = ()


CASES: list[tuple[str, dict[str, Any], tuple[Epoch, ...]]] = [
    (
        "qwen3-moe-wide",
        DP2 | EP,
        (
            Epoch((0, 1)),
            Epoch((0,), kept=((0, 0),)),
            Epoch((0, 1), started=(1,), kept=((0, 0),)),
            Epoch((1,), kept=((1, 0),)),
        ),
    ),
    (
        "deepseek-v3-wide",
        DP4 | EP | {"all2all_backend": "all_to_all", "expert_placement_strategy": "round_robin"},
        (
            Epoch((0, 1, 2, 3)),
            Epoch((0, 1, 3), kept=((0, 0), (1, 1), (3, 2))),
            Epoch((1, 3), kept=((1, 0), (2, 1))),
            Epoch((0, 1, 2, 3), started=(0, 2), kept=((0, 1), (1, 3))),
        ),
    ),
    (
        "qwen3-moe-wide",
        DP2 | TP2 | EP,
        (Epoch((0, 1, 2, 3)), Epoch((0, 1), parked=(2,), kept=((0, 0),)), Epoch((0, 1, 2, 3), started=(3,))),
    ),
    (
        "qwen3-moe-wide",
        DP2 | PP2 | EP,
        (Epoch((0, 1, 2, 3)), Epoch((2, 3), parked=(0,), kept=((1, 0),)), Epoch((0, 1, 2, 3), started=(1,))),
    ),
    (
        "qwen3-moe-wide",
        DP2,
        (Epoch((0, 1)), Epoch((1,), kept=((1, 0),)), Epoch((0, 1), started=(0,), kept=((0, 1),))),
    ),
    ("deepseek-v3-wide", DP4, (Epoch((0, 1, 2, 3)), Epoch((0, 2, 3), kept=((0, 0), (3, 2))))),
    (
        "qwen3-moe-wide",
        DP2 | TP2 | PP2,
        (Epoch(tuple(range(8))), Epoch((0, 1, 2, 3), parked=(5, 6), kept=((0, 0),))),
    ),
    (
        "deepseek-v3-wide",
        DP2 | TP2 | EP | {"attention_data_parallel_size": 2},
        (Epoch((0, 1, 2, 3)), Epoch((2, 3), kept=((2, 0), (3, 1)))),
    ),
    ("llama-wide", TP2, (Epoch((0, 1)), Epoch((0, 1), kept=((0, 0),)), Epoch((0, 1), started=(1,)))),
]


def title(case: tuple[str, dict[str, Any], tuple[Epoch, ...]]) -> str:
    name, sizes, epochs = case
    worlds = [".".join(str(rank) for rank in epoch.members) for epoch in epochs]
    return "-".join([name, *(f"{key[:5]}{value}" for key, value in sizes.items()), *worlds])


@pytest.mark.parametrize("case", CASES, ids=[title(case) for case in CASES])
def test_streams_go_on_as_transformers_would_whoever_comes_and_goes(
    case: tuple[str, dict[str, Any], tuple[Epoch, ...]], checkpoints: Checkpoints
) -> None:
    name, sizes, epochs = case
    folder = checkpoints(name)
    world = ThreadWorld(folder, **sizes)
    streams = mixed_streams(seed=6, max_tokens=30, vocab_size=WIDE_VOCAB_SIZE)[:8]
    driver = world.epoch(epochs[0].members)
    shares = [streams[place :: len(driver.replicas)] for place in range(len(driver.replicas))]
    driver.run(shares, steps=9)
    restated = 0
    for epoch in epochs[1:]:
        driver.close()
        world.start(*epoch.started)
        before, driver = driver, world.epoch(epoch.members, epoch.parked, seed=len(epoch.members))
        driver.restate(before, dict(epoch.kept))
        driver.run([[] for _ in driver.replicas], steps=None if epoch is epochs[-1] else 7)
        restated += driver.counts["restated_decodes"]
    driver.close()
    assert restated > 0
    oracle = Oracle(folder)
    worst = 0.0
    for stream in streams:
        assert oracle.judge(stream.prompt, stream.generated).equal
        expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
        worst = max(worst, relative_error(torch.stack(stream.logits), expected))
    print(f"{title(case)}: largest relative error {worst:.1e}, {restated} rows restated while they decoded")
    assert worst < TOLERANCE


def test_what_a_parked_rank_holds_is_not_read_again(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), **(DP2 | TP2 | EP))
    world.epoch((0, 1, 2, 3)).close()
    world.epoch((0, 1), parked=(2,)).close()
    sources = world.plan[2][:, 2].tolist()
    # Ranks 0 to 3 hold two of eight experts each, in three layers.
    assert sorted(set(sources)) == [-1, 2]
    assert sources.count(2) == sources.count(-1) == 3 * 2
    assert [runner.held().shape for runner in world.runners.values()] == [(3, 4), (3, 4), (3, 2)]


def test_what_has_come_back_is_what_was_there_at_first(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("qwen3-moe"), **(DP2 | EP))
    world.epoch((0, 1)).close()
    first = [runner.held() for runner in world.runners.values()]
    world.epoch((0,)).close()
    assert sorted(world.runners[0].held()[1].tolist()) == list(range(8))
    world.start(1)
    world.epoch((0, 1)).close()
    assert not len(world.plan[2])
    for runner, held in zip(world.runners.values(), first, strict=True):
        assert (runner.held() == held).all()
        assert runner.model.moe_layers[0].experts.gate_up.shape[0] == 4
        assert runner.expert_load.shape == (3, 4)
