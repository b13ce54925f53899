"""Rows that are stated anew in the middle of everything go on as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from drumline.protocol.messages import SamplingSpec
from tests.checkpoints import Checkpoints
from tests.parity.stepdriver import StepDriver, Stream
from tests.parity.threadworld import ThreadWorld

SPECS = (
    SamplingSpec(temperature=0.0, logprobs=3),
    SamplingSpec(temperature=0.9, seed=7, top_p=0.95, logprobs=2),
    SamplingSpec(temperature=0.7, seed=8, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.4),
    SamplingSpec(temperature=0.0, frequency_penalty=0.8, repetition_penalty=1.2, logprobs=0),
    SamplingSpec(temperature=1.0, seed=9, min_p=0.02, top_k=20, min_tokens=20, stop_token_ids=(3, 4)),
)


def streams() -> list[Stream]:
    draw = np.random.default_rng(11)
    lengths = (1, 7, 8, 9, 21, 40, 3, 17)
    return [
        Stream([int(token) for token in draw.integers(0, 250, length)], 30, SPECS[i % len(SPECS)])
        for i, length in enumerate(lengths)
    ]


def undisturbed(world: ThreadWorld, work: list[Stream]) -> None:
    driver = world.epoch(range(world.layout.num_ranks))
    driver.evict_chance = 0.0
    driver.run([work])
    driver.close()


def with_many_epochs(world: ThreadWorld, work: list[Stream]) -> int:
    """Every few steps an epoch ends with a step in vain. Returns how many rows were restated while they decoded."""
    driver = world.epoch(range(world.layout.num_ranks))
    driver.run([work], steps=4)
    restated = 0
    for count in (1, 2, 3, 5, 8, 2, None):
        driver.close()
        before, driver = driver, world.epoch(range(world.layout.num_ranks), seed=count or 0)
        driver.restate(before, {0: 0})
        driver.run([[]], steps=count)
        restated += driver.counts["restated_decodes"]
    driver.close()
    return restated


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3-moe-wide", {}),
        ("llama-wide", {"pipeline_parallel_size": 2}),
        ("deepseek-v3-wide", {"pipeline_parallel_size": 3, "block_size": 16}),
    ],
    ids=str,
)
def test_restated_rows_keep_their_noise_penalties_and_log_probabilities(
    name: str, sizes: dict[str, Any], checkpoints: Checkpoints
) -> None:
    quiet = streams()
    disturbed = copy.deepcopy(quiet)
    undisturbed(ThreadWorld(checkpoints(name), **sizes), quiet)
    restated = with_many_epochs(ThreadWorld(checkpoints(name), **sizes), disturbed)
    assert restated > 10
    for expected, found in zip(quiet, disturbed, strict=True):
        assert found.generated == expected.generated
        assert len(found.logprobs) == len(expected.logprobs)
        for one, other in zip(expected.logprobs, found.logprobs, strict=True):
            assert (other.token, other.rank) == (one.token, one.rank)
            assert abs(other.logprob - one.logprob) < 1e-4
            np.testing.assert_array_equal(other.top_tokens, one.top_tokens)


def test_a_row_of_another_lane_is_stated_in_a_step_that_does_not_compute_it(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("llama-wide"), pipeline_parallel_size=2)
    quiet = [Stream(list(range(5, 14)), 12), Stream(list(range(40, 45)), 12)]
    disturbed = copy.deepcopy(quiet)
    undisturbed(world, quiet)
    driver = world.epoch((0, 1))
    _in_lanes(driver, disturbed)
    driver.run([[]], steps=7)
    assert all(stream.decoding for stream in disturbed)
    assert all(stream.computed % world.config.block_size for stream in disturbed)
    driver.close()
    before, driver = driver, world.epoch((0, 1))
    driver.restate(before, {0: 0})
    driver.evict_chance = 0.0
    # The first step is of lane 0: it states both rows, and computes the one of that lane.
    driver.run([[]], steps=None)
    driver.close()
    assert driver.counts["restated_decodes"] == 2
    assert [stream.generated for stream in disturbed] == [stream.generated for stream in quiet]


def _in_lanes(driver: StepDriver, work: list[Stream]) -> None:
    """Row i in lane i, as if they had been admitted in an epoch before and nothing of them computed."""
    (replica,) = driver.replicas
    replica.rows, replica.restates = dict(enumerate(work)), True
    replica.lanes = {row: row for row in replica.rows}
    driver.evict_chance = 0.0
