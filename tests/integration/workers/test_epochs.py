"""From epoch to epoch: ranks load, leave whatever holds them, and meet again with what they have."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from drumline.protocol.codec import config_digest
from drumline.protocol.messages import (
    Configure,
    Fault,
    Left,
    Load,
    Loaded,
    OpenStore,
    Ready,
    Shutdown,
    StepDone,
    StoreReady,
)
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import (
    EXPERTS,
    MOE_LAYERS,
    PROMPT,
    form_two,
    generate,
    placement,
    start_one,
    start_two,
    stats_of,
    stop,
    until_inside_collective,
)
from tests.integration.workers.processes import (
    NO_EXPERTS,
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    own_experts,
    step,
    worker_config,
)


async def test_a_rank_loads_what_it_is_told_to_and_says_so_once(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    config = worker_config(checkpoints("qwen3-moe"), dp=2, expert_parallel=True)
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, config)
    order = Load(1, own_experts(config, placement(2), 0), num_blocks=48)
    coordinator.send(0, order)
    coordinator.send(0, order)
    loaded = await coordinator.expect(Loaded, 0)
    assert (loaded.digest, loaded.num_blocks, loaded.device) == (config_digest(config), 48, "cpu")
    assert loaded.block_bytes > 0
    (left,) = await coordinator.leave([0], 1)
    assert (left.term, left.epoch, left.rank, left.num_blocks) == (1, 1, 0, 48)
    assert left.held.tolist() == [[0, 1, 2, 3]] * MOE_LAYERS
    assert not coordinator.holds(Loaded)
    coordinator.send(0, order)
    again = await coordinator.expect(Loaded, 0)
    assert (again.num_blocks, again.load_s) == (48, loaded.load_s)
    await stop(forkserver, coordinator, [pid])


async def test_a_rank_comes_out_of_a_collective_within_100_ms_of_the_order(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    (alone, _) = await generate(coordinator, [PROMPT, []], 2)
    waits = []
    for epoch in range(2, 6):
        os.kill(pids[1], signal.SIGSTOP)
        number = 2 if epoch == 2 else 0
        parts = {} if epoch == 2 else admission(PROMPT)
        tokens = 1 if epoch == 2 else len(PROMPT)
        coordinator.send(0, step(number, [tokens, 0], epoch=epoch - 1, **parts))
        coordinator.send(1, step(number, [tokens, 0], epoch=epoch - 1))
        await until_inside_collective(coordinator)
        start = time.monotonic()
        (left,) = await coordinator.leave([0], epoch)
        waits.append(1e3 * (time.monotonic() - start))
        assert (left.epoch, left.held.tolist()) == (epoch, [[0, 1, 2, 3]] * MOE_LAYERS)
        os.kill(pids[1], signal.SIGCONT)
        await coordinator.leave([1], epoch)
        await form_two(coordinator, epoch)
    print(f"out of a collective: {', '.join(f'{wait:.0f}' for wait in waits)} ms")
    assert min(waits) < 100
    coordinator.send(0, step(0, [len(PROMPT), 0], epoch=5, **admission(PROMPT)))
    coordinator.send(1, step(0, [len(PROMPT), 0], epoch=5))
    done = await coordinator.expect(StepDone, 0)
    assert done.tokens.tolist() == alone[:1]
    await coordinator.expect(StepDone, 1)
    await stop(forkserver, coordinator, pids)


async def test_who_survives_goes_on_alone_with_all_experts_and_the_same_tokens(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    model = checkpoints("qwen3-moe")
    pids = await start_two(forkserver, coordinator, model)
    together, _ = await generate(coordinator, [PROMPT, []], 6)
    coordinator.send(0, step(6, [1, 0]))
    os.kill(pids[1], signal.SIGKILL)
    await coordinator.expect(Fault, 0)
    forkserver.expect_exit(pids[1])
    start = time.monotonic()
    (left,) = await coordinator.leave([0], 2)
    assert left.held.tolist() == [[0, 1, 2, 3]] * MOE_LAYERS
    await _alone(coordinator, 2)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT)))
    done = await coordinator.expect(StepDone, 0)
    print(f"from Leave to the next token: {1e3 * (time.monotonic() - start):.0f} ms")
    assert done.tokens.tolist() == together[:1]
    (left,) = await coordinator.leave([0], 3)
    assert left.held.tolist() == [list(range(EXPERTS))] * MOE_LAYERS

    # A replacement comes, and the experts are shared out again, read from where they are.
    config = worker_config(model, dp=2, expert_parallel=True)
    pids[1] = forkserver.spawn(1, coordinator.endpoint)
    await coordinator.welcome(1, config)
    await coordinator.load(1, config, placement(2))
    await coordinator.leave([0, 1], 4)
    await form_two(coordinator, 4)
    for rank in (0, 1):
        coordinator.send(rank, step(0, [len(PROMPT), 0], epoch=4, **(admission(PROMPT) if rank == 0 else {})))
    done = await coordinator.expect(StepDone, 0)
    assert done.tokens.tolist() == together[:1]
    await coordinator.expect(StepDone, 1)
    await stop(forkserver, coordinator, pids)


async def _alone(coordinator: CoordinatorEnd, epoch: int) -> None:
    """Rank 0 alone, with the experts that it lacks read from the checkpoint."""
    lacks = [[layer, slot, -1, 0] for layer in range(MOE_LAYERS) for slot in range(EXPERTS // 2, EXPERTS)]
    await coordinator.configure([0], placement(1), epoch=epoch, fetches=np.array(lacks, dtype=np.int32))


async def test_a_parked_rank_gives_its_experts_and_computes_nothing(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    together, _ = await generate(coordinator, [PROMPT, []], 2)
    await coordinator.leave([0, 1], 2)
    store = await coordinator.open_store(1, 2)
    half = EXPERTS // 2
    gets = [[layer, half + slot, 1, slot] for layer in range(MOE_LAYERS) for slot in range(half)]
    fetches: Any = np.array(gets, dtype=np.int32)
    await coordinator.configure([0], placement(1), epoch=2, store=store, parked=(1,), fetches=fetches)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT)))
    done = await coordinator.expect(StepDone, 0)
    assert done.tokens.tolist() == together[:1]
    lefts = await coordinator.leave([0, 1], 3)
    assert [left.held.tolist()[0] for left in lefts] == [list(range(EXPERTS)), list(range(half, EXPERTS))]
    await stop(forkserver, coordinator, pids)


async def test_a_newer_leave_abandons_the_forming_of_the_epoch_before(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    """Rank 1 never comes to the store of epoch 2; what came for epochs in between is passed by."""
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    await coordinator.leave([0, 1], 2)
    store = await coordinator.open_store(0, 2)
    os.kill(pids[1], signal.SIGSTOP)
    await coordinator.configure([0, 1], placement(2), epoch=2, store=store, wait=False)
    await asyncio.sleep(0.3)
    coordinator.send(0, OpenStore(1, 3, "127.0.0.1"))
    await coordinator.configure([0], placement(2), epoch=3, wait=False)
    start = time.monotonic()
    lefts = await coordinator.leave([0], 4)
    print(f"out of the forming: {1e3 * (time.monotonic() - start):.0f} ms")
    assert time.monotonic() - start < 1.0
    assert lefts[0].epoch == 4
    os.kill(pids[1], signal.SIGCONT)
    await coordinator.leave([1], 4)
    await form_two(coordinator, 4)
    coordinator.send(0, step(0, [0, 0], epoch=4))
    coordinator.send(1, step(0, [0, 0], epoch=4))
    await coordinator.expect(StepDone, 0)
    assert not coordinator.holds(Left)
    await coordinator.expect(StepDone, 1)
    await stop(forkserver, coordinator, pids)


async def test_an_epoch_that_cannot_form_is_a_fault_of_it_and_the_weights_stay(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    (alone,) = await generate(coordinator, [PROMPT], 1)
    await coordinator.leave([0], 2)
    stranger = Configure(1, 2, "compute", (), "", 0, placement(1))
    coordinator.send(0, stranger)
    fault = await coordinator.expect(Fault, 0)
    assert (fault.term, fault.epoch, fault.error.kind) == (1, 2, "protocol")
    assert "is no member of the epoch" in fault.error.text
    await coordinator.leave([0], 3)
    (ready,) = await coordinator.configure([0], placement(1), epoch=3)
    assert ready.epoch == 3
    coordinator.send(0, step(0, [len(PROMPT)], epoch=3, **admission(PROMPT)))
    assert (await coordinator.expect(StepDone, 0)).tokens.tolist() == alone
    await stop(forkserver, coordinator, [pid])


async def test_second_copies_of_orders_change_nothing(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    await coordinator.leave([0, 1], 2)
    store = await coordinator.open_store(0, 2)
    coordinator.send(0, OpenStore(1, 2, "127.0.0.1"))
    await coordinator.configure([0, 1], placement(2), epoch=2, store=store)
    for _ in range(2):
        await coordinator.configure([0, 1], placement(2), epoch=2, store=store, wait=False)
        for rank in (0, 1):
            coordinator.send(rank, step(0, [len(PROMPT), 0], epoch=2, **(admission(PROMPT) if rank == 0 else {})))
    for rank in (0, 1):
        coordinator.send(rank, step(1, [1, 0], epoch=2))
    for rank in (0, 1):
        assert [(await coordinator.expect(StepDone, rank)).step for _ in range(2)] == [0, 1]
    assert (await stats_of(coordinator, 2))["stale"] == 4
    for kind in (StepDone, StoreReady, Ready, Fault):
        assert not coordinator.holds(kind)
    await stop(forkserver, coordinator, pids)


async def test_a_rank_whose_place_is_taken_says_so_and_ends_well(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    """It was stopped meanwhile, inside a collective."""
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    await until_inside_collective(coordinator)
    os.kill(pids[0], signal.SIGSTOP)
    incarnation = coordinator.hellos[0].incarnation
    coordinator.send(0, Shutdown(1, f"the place of rank 0 (incarnation {incarnation}) is taken: it is furthest behind"))
    await asyncio.sleep(0.3)
    os.kill(pids[0], signal.SIGCONT)
    code, number, tail = forkserver.expect_exit(pids[0], 3.0)
    assert (code, number) == (0, 0)
    assert f"WARNING this process (rank 0, incarnation {incarnation}) was replaced: the place of rank 0" in tail
    coordinator.send(1, Shutdown(1, "the engine closes"))
    assert forkserver.expect_exit(pids[1], 3.0) == (0, 0, "")


async def test_a_rank_that_was_never_loaded_reports_a_leave_as_a_fault_and_stays(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, tmp_path: Path
) -> None:
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, worker_config(tmp_path))
    await coordinator.configure([0], NO_EXPERTS, wait=False)
    fault = await coordinator.expect(Fault, 0)
    assert (fault.error.kind, fault.error.text) == ("protocol", "the model is not loaded")
    await stop(forkserver, coordinator, [pid])
