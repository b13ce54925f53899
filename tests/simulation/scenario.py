"""A random engine and a random day for it, all from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.protocol.messages import SamplingSpec, Submit
from tests.simulation.oracle import expected_output

CONNECTIONS = 3


@dataclass(slots=True)
class Plan:
    """One request and what its client will do to it. Times are virtual seconds; negative means never.

    ``stop_after``: the client finds a stop string after so many tokens of index 0 (0: never).
    """

    submit: Submit
    connection: int
    at: float
    cancel_at: float = -1.0
    resume_at: float = -1.0
    stop_after: int = 0


@dataclass(slots=True)
class Scenario:
    """Delays are mean virtual seconds; chances are per event. ``new_epochs``: when all workers are replaced.
    ``regroupings``: (when, group) of epochs that end because some replicas are lost."""

    seed: int
    config: CoreConfig
    num_blocks: list[int]
    plans: list[Plan]
    step_time: float
    delay: float
    chance_duplicate: float
    through_codec: bool
    drops: list[tuple[float, int]] = field(default_factory=list)
    new_epochs: list[float] = field(default_factory=list)
    regroupings: list[tuple[float, int]] = field(default_factory=list)


def make_scenario(
    seed: int,
    dp: int | None = None,
    async_scheduling: bool | None = None,
    pp: int | None = None,
    regroupings: int | None = None,
) -> Scenario:
    """Small numbers on purpose: few blocks, few rows, short contexts, so that every limit is met all the time."""
    rng = random.Random(seed)
    dp = rng.choice((1, 1, 2, 4)) if dp is None else dp
    async_scheduling = rng.random() < 0.7 if async_scheduling is None else async_scheduling
    pp = rng.choice((1, 1, 2, 3)) if pp is None else pp
    attn_dp = rng.choice((1, 1, 2)) if dp < 4 else 1
    block_size = rng.choice((1, 2, 3, 4))
    rows = rng.randint(1, 4 + pp)
    context = rng.randint(6, 40)
    chunked = rng.random() < 0.8
    config = CoreConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=rng.randint(rows, 16) if chunked else context + rng.randint(0, 16),
        block_size=block_size,
        max_model_len=context,
        vocab_size=rng.choice((7, 30, 1000)),
        eos_token_ids=(3,) if rng.random() < 0.8 else (2, 5),
        data_parallel_size=dp,
        lockstep=rng.random() < 0.7,
        enable_prefix_caching=rng.random() < 0.8,
        enable_chunked_prefill=chunked,
        async_scheduling=async_scheduling,
        max_waiting=rng.choice((3, 100)),
        prefix_affinity=rng.random() < 0.3,
        pipeline_parallel_size=pp,
        attention_data_parallel_size=attn_dp,
        attention_tensor_parallel_size=rng.choice((1, 2)),
    )
    tight = rng.random() < 0.6
    whole = -(-context // block_size)
    blocks = max(2, round(whole * rng.uniform(0.6, 1.6))) if tight else rng.randint(whole, 4 * whole)
    day = rng.uniform(0.0, 20.0)
    scenario = Scenario(
        seed=seed,
        config=config,
        num_blocks=[blocks + (rng.randint(0, 2) if rng.random() < 0.2 else 0) for _ in range(dp * attn_dp)],
        plans=_plans(rng, config, day),
        step_time=rng.choice((0.01, 1.0)),
        delay=rng.choice((0.0, 0.2, 3.0)),
        chance_duplicate=rng.choice((0.0, 0.1)),
        through_codec=seed % 8 == 0,
    )
    if rng.random() < 0.15:
        scenario.drops.append((rng.uniform(0, day + 10), 1 + rng.randrange(CONNECTIONS)))
    if rng.random() < 0.1:
        scenario.new_epochs.append(rng.uniform(0, day + 10))
    for _ in range(rng.choice((0, 0, 1, 3)) if regroupings is None else regroupings):
        scenario.regroupings.append((rng.uniform(0, day + 15), rng.randrange(4)))
    return scenario


def make_wide_scenario(seed: int) -> Scenario:
    """Two replicas of 40 rows with 150 requests, and blocks for about half of them; two lanes for every other seed."""
    rng = random.Random(seed)
    config = CoreConfig(
        max_num_seqs=40,
        max_num_batched_tokens=256,
        block_size=8,
        max_model_len=100,
        vocab_size=1000,
        eos_token_ids=(3,),
        data_parallel_size=2,
        lockstep=True,
        pipeline_parallel_size=1 + seed % 2,
    )
    plans = _plans(rng, config, day=15.0, count=150)
    return Scenario(seed, config, [70, 80], plans, 1.0, 0.2, 0.02, False, drops=[(12.0, 1)], new_epochs=[20.0])


def _plans(rng: random.Random, config: CoreConfig, day: float, count: int = 0) -> list[Plan]:
    shared = [rng.randrange(config.vocab_size) for _ in range(config.max_model_len)]
    plans: list[Plan] = []
    for number in range(count or rng.randint(1, 6)):
        length = rng.randint(1, max(1, (config.max_model_len - 2) // rng.choice((1, 2, 2))))
        kept = rng.randint(0, length) if rng.random() < 0.7 else 0
        prompt = shared[:kept] + [rng.randrange(config.vocab_size) for _ in range(length - kept)]
        at = rng.uniform(0, day)
        if plans and rng.random() < 0.25:
            prompt, at = _next_turn(rng, config, rng.choice(plans))
        plan = Plan(_submit(rng, config, number, prompt), 1 + rng.randrange(CONNECTIONS), at)
        if rng.random() < 0.2:
            plan.cancel_at = at + rng.uniform(0, 12)
        if rng.random() < 0.15:
            plan.resume_at = at + rng.uniform(0, 25)
        if rng.random() < 0.15:
            plan.stop_after = rng.randint(1, 6)
        plans.append(plan)
    return plans


def _next_turn(rng: random.Random, config: CoreConfig, before: Plan) -> tuple[list[int], float]:
    """A prompt that goes on where an earlier request's output stands, as in a conversation, and when it is
    submitted."""
    submit = before.submit
    prompt: list[int] = submit.prompt.tolist()
    room = config.max_model_len - 1 - len(prompt)
    output = expected_output(
        prompt, submit.sampling.seed, 0, frozenset(), 0, min(submit.max_tokens, room), config.vocab_size
    ).tokens
    text = [*prompt, *output, *(rng.randrange(config.vocab_size) for _ in range(rng.randint(0, 2)))]
    return text[: config.max_model_len - 1], before.at + rng.uniform(0, 25)


def _submit(rng: random.Random, config: CoreConfig, number: int, prompt: list[int]) -> Submit:
    max_tokens = rng.choice((1, rng.randint(1, 6), rng.randint(1, 12), rng.randint(4, 20), 60))
    count = rng.choice((0, 0, 1, 2, 12))
    stops = tuple(rng.randrange(config.vocab_size) for _ in range(count if config.vocab_size > 7 else min(count, 1)))
    sampling = SamplingSpec(
        seed=rng.randrange(1000),
        min_tokens=rng.randint(0, min(4, max_tokens)) if rng.random() < 0.3 else 0,
        stop_token_ids=stops,
        logprobs=0 if rng.random() < 0.15 else -1,
    )
    return Submit(
        call_id=number,
        request_id=f"r{number}",
        prompt=np.asarray(prompt, dtype=np.int32),
        sampling=sampling,
        max_tokens=max_tokens,
        n=rng.choice((1, 1, 1, 2, 3)),
        seed_given=rng.random() < 0.8,
        ignore_eos=rng.random() < 0.4,
        priority=rng.choice((0, 0, 0, -1, 2)),
        data_parallel_rank=rng.randrange(config.data_parallel_size) if rng.random() < 0.2 else -1,
    )
