"""Whole engines, real processes and all, run for comparison."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drumline.engine import (
    AsyncEngine,
    CacheConfig,
    EngineConfig,
    FaultConfig,
    Logprob,
    ParallelConfig,
    SamplingParams,
    SchedulerConfig,
)
from drumline.protocol.status import EngineStatus
from tests.parity.oracle import Oracle

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 64, 65, 90, 120)
NEW_TOKENS = 64
# Too few blocks for the rows that run together, so that some are preempted; enough for any one request.
SCARCE_BLOCKS = {1: 40, 2: 24, 4: 14}


@dataclass
class Answer:
    """What one request came to."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    num_cached_tokens: int = 0


def mixed_prompts(vocab_size: int, seed: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Prompts of different lengths in random order; all of 40 tokens and more begin with the same 33."""
    draw = random.Random(seed)
    beginning = [draw.randrange(vocab_size) for _ in range(33)]
    prompts = []
    for length in lengths:
        own = [draw.randrange(vocab_size) for _ in range(length)]
        prompts.append((beginning + own)[:length] if length >= 40 else own)
    draw.shuffle(prompts)
    return prompts


def scarce_config(model: Path | str, parallel: ParallelConfig, *, replicas: int | None = None) -> EngineConfig:
    """An engine with so little room that it has to chunk prompts and preempt. ``replicas``: attention replicas, where
    they are not the engine replicas."""
    blocks = SCARCE_BLOCKS[replicas or parallel.data_parallel_size]
    return EngineConfig(
        model=str(model),
        max_model_len=256,
        parallel=parallel,
        cache=CacheConfig(num_gpu_blocks_override=blocks),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24),
        # These runs ask what is computed; on a loaded machine a step may take its time.
        faults=FaultConfig(step_deadline_s=60.0),
    )


async def answer(engine: AsyncEngine, prompt: Sequence[int], params: SamplingParams, request_id: str) -> Answer:
    """Reads one request to its end and checks that the deltas add up to the whole."""
    result = Answer(list(prompt))
    async for out in engine.generate(list(prompt), params, request_id):
        result.tokens.extend(out.token_ids_delta)
        assert out.token_ids == result.tokens
        result.logprobs = out.logprobs or []
        result.num_cached_tokens = out.num_cached_tokens
    return result


async def run_engine(
    config: EngineConfig, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> tuple[list[Answer], EngineStatus]:
    """All requests at once through one engine."""
    async with AsyncEngine(config) as engine:
        answers = await asyncio.gather(
            *(
                answer(engine, prompt, one, f"r{number}")
                for number, (prompt, one) in enumerate(zip(prompts, params, strict=True))
            )
        )
        return answers, await engine.status()


def logprob_error(oracle: Oracle, one: Answer) -> float:
    """Largest error of the returned log probabilities, relative to the largest expected one."""
    expected = oracle.logits(one.prompt + one.tokens)[len(one.prompt) - 1 : -1].log_softmax(-1)
    worst = 0.0
    for at, entries in enumerate(one.logprobs):
        scale = float(expected[at].abs().max())
        for token, entry in entries.items():
            worst = max(worst, abs(entry.logprob - float(expected[at, token])) / scale)
    return worst
