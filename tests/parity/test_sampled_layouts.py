"""Whatever the layout, a request draws the tokens that one rank draws: seeds, filters, penalties, logprobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drumline.protocol.messages import SamplingSpec
from tests.checkpoints import WIDE_VOCAB_SIZE, Checkpoints
from tests.parity.stepdriver import StepDriver, Stream, loaded_runner, worker_config
from tests.parity.threadranks import thread_driver

TOKENS = 24
EVEN = tuple(range(0, WIDE_VOCAB_SIZE, 2))
SAMPLINGS = (
    SamplingSpec(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingSpec(temperature=0.0, frequency_penalty=0.9),
    SamplingSpec(temperature=0.9, seed=11, repetition_penalty=1.2, frequency_penalty=0.4, top_k=40),
    SamplingSpec(temperature=1.0, seed=12, top_p=0.9, logprobs=3),
    SamplingSpec(temperature=1.0, seed=12, index=1, top_p=0.9),
    SamplingSpec(temperature=1.2, seed=13, min_p=0.05),
    SamplingSpec(temperature=0.8, seed=14, min_tokens=TOKENS // 2, stop_token_ids=EVEN),
    SamplingSpec(temperature=0.0, min_tokens=TOKENS, stop_token_ids=EVEN, logprobs=0),
)


def streams() -> list[Stream]:
    """One per sampling, all of a beginning in common, long enough to be chunked and cached."""
    draw = np.random.default_rng(8)
    beginning = draw.integers(0, WIDE_VOCAB_SIZE, 20).tolist()
    prompts = [beginning + draw.integers(0, WIDE_VOCAB_SIZE, 5 * place).tolist() for place in range(len(SAMPLINGS))]
    return [Stream(prompt, TOKENS, sampling) for prompt, sampling in zip(prompts, SAMPLINGS, strict=True)]


def run(driver: StepDriver) -> list[Stream]:
    found, replicas = streams(), len(driver.replicas)
    driver.run([found[place::replicas] for place in range(replicas)])
    driver.close()
    return found


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3-moe-kv2", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("qwen3-moe-kv2", {"data_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True}),
        ("qwen3-moe-kv2", {"tensor_parallel_size": 4, "attention_data_parallel_size": 2}),
        ("llama-wide", {"pipeline_parallel_size": 3}),
        ("deepseek-v3-wide", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ],
    ids=str,
)
def test_every_layout_draws_the_tokens_of_one_rank(name: str, sizes: dict[str, Any], checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    alone = run(StepDriver([[loaded_runner(worker_config(folder))]]))
    driver = thread_driver(folder, evict_chance=0.15, **sizes)
    for expected, found in zip(alone, run(driver), strict=True):
        assert found.generated == expected.generated, found.sampling
        assert [entry.token for entry in found.logprobs] == [entry.token for entry in expected.logprobs]
        wanted = 0 if found.sampling.logprobs < 0 else TOKENS
        assert len(found.logprobs) == wanted
        for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert driver.counts["evictions"] > 0
    assert driver.counts["cached_tokens"] > 0
    assert not set(alone[-1].generated) & set(EVEN)
