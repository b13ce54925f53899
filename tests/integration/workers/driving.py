"""Ranks driven by hand: started, formed into epochs, made to compute."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from drumline.protocol.codec import config_digest
from drumline.protocol.messages import Call, CallResult, Shutdown, StepDone, WorkerConfig
from drumline.protocol.placement import initial_placement
from tests.integration.workers.processes import (
    DEADLINE_S,
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    step,
    worker_config,
)

MOE_LAYERS, EXPERTS = 3, 8
PROMPT = [11, 7, 200, 31, 5, 90, 44]


def placement(ep_size: int) -> Any:
    return initial_placement(MOE_LAYERS, EXPERTS, ep_size)


async def start_one(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, model: Path, **changes: Any
) -> tuple[int, WorkerConfig]:
    config = worker_config(model, **changes)
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, config)
    loaded = await coordinator.load(0, config)
    assert (loaded.digest, loaded.num_blocks) == (config_digest(config), config.num_blocks)
    assert loaded.weight_bytes > 0
    assert loaded.free_bytes > 0
    (ready,) = await coordinator.configure([0], placement(1))
    assert (ready.digest, ready.num_blocks) == (loaded.digest, loaded.num_blocks)
    assert ready.weight_bytes == loaded.weight_bytes
    return pid, config


async def start_two(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, model: Path, **changes: Any
) -> list[int]:
    config = worker_config(model, dp=2, expert_parallel=True, **changes)
    pids = [forkserver.spawn(rank, coordinator.endpoint) for rank in (0, 1)]
    for rank in (0, 1):
        await coordinator.welcome(rank, config)
    for rank in (0, 1):
        await coordinator.load(rank, config, placement(2))
    await form_two(coordinator, 1)
    return pids


async def form_two(coordinator: CoordinatorEnd, epoch: int) -> None:
    store = await coordinator.open_store(1, epoch)
    await coordinator.configure([0, 1], placement(2), epoch=epoch, store=store)


async def stop(forkserver: ForkServerProcess, coordinator: CoordinatorEnd, pids: Sequence[int]) -> None:
    for rank in range(len(pids)):
        coordinator.send(rank, Shutdown(1))
    for pid in pids:
        assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)


async def generate(coordinator: CoordinatorEnd, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of one row per replica; an empty prompt makes a replica that only runs dummy steps."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for number in range(count):
        first = number == 0
        across = [(len(prompt) if first else 1) if prompt else 0 for prompt in prompts]
        for rank, prompt in enumerate(prompts):
            parts = admission(prompt) if first and prompt else {}
            coordinator.send(rank, step(number, across, **parts))
        for rank, prompt in enumerate(prompts):
            done = await coordinator.expect(StepDone, rank)
            assert (done.term, done.epoch, done.step) == (1, 1, number)
            assert len(done.tokens) == (1 if prompt else 0)
            tokens[rank] += done.tokens.tolist()
    return tokens


async def ping(coordinator: CoordinatorEnd, call_id: int = 77) -> dict[str, Any]:
    coordinator.send(0, Call(1, 1, call_id, "ping"))
    answer = await coordinator.expect(CallResult, 0)
    assert (answer.call_id, answer.ok) == (call_id, True)
    value: dict[str, Any] = msgspec.msgpack.decode(answer.value)
    return value


async def until_inside_collective(coordinator: CoordinatorEnd) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not (await ping(coordinator))["inside"]:
            pass


async def stats_of(coordinator: CoordinatorEnd, epoch: int = 1, term: int = 1) -> dict[str, Any]:
    coordinator.send(0, Call(term, epoch, 99, "stats"))
    answer = await coordinator.expect(CallResult, 0)
    value: dict[str, Any] = msgspec.msgpack.decode(answer.value)
    return value
