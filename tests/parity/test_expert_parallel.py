"""Experts spread over replicas in one process: the same tokens as one rank, dummy steps included."""

from __future__ import annotations

import copy

import pytest
import torch

from drumline.protocol.messages import SamplingSpec
from tests.checkpoints import MOE_CHECKPOINTS, Checkpoints
from tests.parity.oracle import Oracle, relative_error
from tests.parity.stepdriver import StepDriver, Stream, loaded_runner, worker_config
from tests.parity.test_one_rank import TOLERANCE, mixed_streams
from tests.parity.threadranks import thread_driver


def spread(checkpoints: Checkpoints, name: str, size: int, strategy: str) -> StepDriver:
    return thread_driver(
        checkpoints(name), data_parallel_size=size, enable_expert_parallel=True, expert_placement_strategy=strategy
    )


@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
@pytest.mark.parametrize(("size", "strategy"), [(2, "linear"), (2, "round_robin"), (4, "linear")])
def test_spread_experts_write_what_transformers_writes(
    checkpoints: Checkpoints, name: str, size: int, strategy: str
) -> None:
    driver = spread(checkpoints, name, size, strategy)
    streams = mixed_streams(seed=2, max_tokens=64 if size == 2 else 24)
    # The last replica has one short stream alone, so that it runs dummy steps while the others go on.
    shares = [streams[rank :: size - 1] if rank < size - 1 else [] for rank in range(size)]
    alone = shares[0].pop()
    alone.max_tokens = 3
    shares[-1] = [alone]
    driver.run(shares)
    driver.close()
    assert driver.counts["dummy_steps"] > 0
    assert driver.counts["evictions"] > 0
    oracle = Oracle(checkpoints(name))
    for stream in streams:
        verdict = oracle.judge(stream.prompt, stream.generated)
        assert verdict.equal
        assert not verdict.tie
        expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
        assert relative_error(torch.stack(stream.logits), expected) < TOLERANCE


@pytest.mark.parametrize("size", [2, 4])
def test_sampled_tokens_are_the_same_in_every_layout_and_company(checkpoints: Checkpoints, size: int) -> None:
    prompts = [stream.prompt for stream in mixed_streams(seed=4)]
    streams = [
        Stream(prompt, 32, SamplingSpec(temperature=0.8, top_p=0.9, seed=1000 + i)) for i, prompt in enumerate(prompts)
    ]
    one, two = copy.deepcopy(streams), copy.deepcopy(streams)
    driver = StepDriver([[loaded_runner(worker_config(checkpoints("qwen3-moe")))]])
    driver.run([one])
    driver.close()
    driver = spread(checkpoints, "qwen3-moe", size, "round_robin")
    driver.run([two[rank::size] for rank in range(size)])
    driver.close()
    assert [stream.generated for stream in one] == [stream.generated for stream in two]


def test_load_counts_each_pair_once_where_it_is_computed(checkpoints: Checkpoints) -> None:
    driver = spread(checkpoints, "qwen3-moe", 2, "round_robin")
    driver.run([[Stream(list(range(50)), 6)], []])
    driver.close()
    one = loaded_runner(worker_config(checkpoints("qwen3-moe")))
    single = StepDriver([[one]])
    single.run([[Stream(list(range(50)), 6)]])
    single.close()
    first, second = (replica.runner.expert_load for replica in driver.replicas)
    # Round robin: the even experts are on rank 0, the odd ones on rank 1.
    assert torch.equal(first, one.expert_load[:, 0::2])
    assert torch.equal(second, one.expert_load[:, 1::2])
    assert int(one.expert_load.sum()) == 3 * 2 * (50 + 5)
