"""One rank against transformers: logits and greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drumline.workers.model_runner import ModelRunner
from tests.checkpoints import CHECKPOINTS, VOCAB_SIZE, Checkpoints
from tests.parity.oracle import Oracle, relative_error
from tests.parity.stepdriver import StepDriver, Stream, loaded_runner, worker_config

TOLERANCE = 1e-4
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 30, 31, 33, 40, 64, 65, 90, 120)


def mixed_streams(seed: int, max_tokens: int = 64, shared: int = 24, vocab_size: int = VOCAB_SIZE) -> list[Stream]:
    """16 prompts of different lengths; the longer ones begin with the same tokens."""
    draw = random.Random(seed)
    beginning = [draw.randrange(vocab_size) for _ in range(shared)]
    streams = []
    for length in LENGTHS:
        own = [draw.randrange(vocab_size) for _ in range(length)]
        streams.append(Stream((beginning + own)[:length] if length > shared else own, max_tokens))
    draw.shuffle(streams)
    return streams


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    return checkpoints(request.param)


@pytest.fixture
def driver(folder: Path) -> Iterator[StepDriver]:
    driver = StepDriver([[loaded_runner(worker_config(folder))]], seed=3, evict_chance=0.1, share_prefixes=True)
    yield driver
    driver.close()


def test_mixed_requests_give_the_logits_and_the_greedy_tokens_of_transformers(folder: Path, driver: StepDriver) -> None:
    streams = mixed_streams(seed=1)
    driver.run([streams])
    oracle = Oracle(folder)
    worst, ties = 0.0, 0
    for stream in streams:
        assert len(stream.generated) == 64
        verdict = oracle.judge(stream.prompt, stream.generated)
        assert verdict.equal, f"{verdict} for a prompt of {len(stream.prompt)}"
        ties += verdict.tie
        expected = oracle.logits(stream.tokens)[len(stream.prompt) - 1 : -1]
        worst = max(worst, relative_error(torch.stack(stream.logits), expected))
    print(f"{folder.name}: largest relative error {worst:.1e}, ties {ties} of {len(streams)}, {driver.counts}")
    assert worst < TOLERANCE
    assert ties == 0
    for kind in ("chunks", "evictions", "cached_tokens", "mixed_steps"):
        assert driver.counts[kind] > 0, driver.counts


def test_greedy_text_is_what_transformers_generate_itself_writes(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe")
    stream = Stream([5, 77, 140, 9, 31], 64)
    driver = StepDriver([[loaded_runner(worker_config(folder))]])
    driver.run([[stream]])
    driver.close()
    assert stream.generated == Oracle(folder).greedy(stream.prompt, 64)


def test_a_wrong_weight_is_noticed(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3-moe")
    runner: ModelRunner = loaded_runner(worker_config(folder))
    runner.model.moe_layers[1].experts.down[3].mul_(1.01)
    stream = Stream(list(range(40)), 8)
    driver = StepDriver([[runner]])
    driver.run([[stream]])
    driver.close()
    expected = Oracle(folder).logits(stream.tokens)[len(stream.prompt) - 1 : -1]
    assert relative_error(torch.stack(stream.logits), expected) > TOLERANCE
