"""Whole workers, driven over a real ROUTER as a coordinator drives them."""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import msgspec
import numpy as np

from drumline.protocol.codec import config_digest
from drumline.protocol.messages import (
    Call,
    CallResult,
    Fault,
    HelloWorker,
    Load,
    Shutdown,
    StepDone,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.workers.inbox import INBOX_LIMIT
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import (
    EXPERTS,
    MOE_LAYERS,
    PROMPT,
    form_two,
    generate,
    ping,
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
    start_by_hand,
    step,
    worker_config,
)


async def test_two_ranks_say_the_same_tokens_as_one(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoints("qwen3-moe")
    pid, _ = await start_one(forkserver, coordinator, model)
    (alone,) = await generate(coordinator, [PROMPT], 8)
    await stop(forkserver, coordinator, [pid])

    pids = await start_two(forkserver, coordinator, model)
    idle, together = await generate(coordinator, [[], PROMPT], 8)
    await stop(forkserver, coordinator, pids)
    assert idle == []
    assert together == alone


async def test_ping_is_answered_within_100_ms_while_a_step_runs(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    rows, length = 48, 480
    pid, _ = await start_one(
        forkserver,
        coordinator,
        checkpoints("qwen3-moe"),
        max_model_len=512,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * length,
        num_blocks=rows * 32,
    )
    admitted = tuple(
        admission([3 + row] * length, row, tuple(range(row * 32, row * 32 + 30)))["admitted"][0] for row in range(rows)
    )
    everyone = np.arange(rows, dtype=np.int32)
    coordinator.send(
        0,
        step(
            0,
            [rows * length],
            admitted=admitted,
            prefill_rows=everyone,
            prefill_counts=np.full(rows, length, dtype=np.int32),
        ),
    )
    while (await ping(coordinator))["step"] < 0:
        pass
    waits: list[float] = []
    began = time.perf_counter()
    while not coordinator.holds(StepDone):
        start = time.perf_counter()
        value = await ping(coordinator)
        waits.append(time.perf_counter() - start)
        assert (value["pid"], value["epoch"], value["step"]) == (pid, 1, 0)
    took = time.perf_counter() - began
    done = await coordinator.expect(StepDone, 0)
    print(f"{len(waits)} pings while a step of {took:.2f} s ran: at most {1e3 * max(waits):.1f} ms")
    assert len(done.tokens) == rows
    assert len(waits) >= 10, "the step was too short to tell"
    # One wait in a hundred may be the machine's own business.
    assert sorted(waits)[len(waits) * 99 // 100] < 0.1
    await stop(forkserver, coordinator, [pid])


async def test_a_step_out_of_order_is_a_fault_and_the_next_epoch_works(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    first = await generate(coordinator, [PROMPT], 2)
    coordinator.send(0, step(5, [1]))
    fault = await coordinator.expect(Fault, 0)
    assert (fault.error.kind, fault.error.rank, fault.error.epoch) == ("protocol", 0, 1)
    assert fault.error.text == "step 5 found, step 2 is the next"
    assert fault.error.incarnation == coordinator.hellos[0].incarnation
    assert "ProtocolError" in fault.error.traceback

    coordinator.send(0, step(2, [1]))  # the epoch is broken: dropped
    await coordinator.configure([0], placement(1), epoch=2)
    coordinator.send(0, step(3, [1]))  # of an epoch that is over: dropped
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT)))
    done = await coordinator.expect(StepDone, 0)
    assert (done.epoch, done.step) == (2, 0)
    assert done.tokens.tolist() == first[0][:1]
    stats = await stats_of(coordinator, epoch=2)
    assert stats["stale"] == 2
    assert stats["faults"] == 1
    await stop(forkserver, coordinator, [pid])


async def test_a_step_that_contradicts_its_header_is_a_fault_and_nobody_hangs(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    coordinator.send(0, step(0, [len(PROMPT), 3], **admission(PROMPT)))
    coordinator.send(1, step(0, [len(PROMPT), 3]))
    fault = await coordinator.expect(Fault, 1)
    assert fault.error.kind == "protocol"
    lost = await coordinator.expect(Fault, 0)  # it waited for rank 1, which closed its group
    assert lost.error.kind == "peer_lost"
    await form_two(coordinator, 2)
    await stop(forkserver, coordinator, pids)


async def test_a_killed_peer_is_told_at_once(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    fault = await coordinator.expect(Fault, 0)
    assert fault.error.kind == "peer_lost"
    assert time.monotonic() - start < 1.0
    assert forkserver.expect_exit(pids[1])[:2] == (0, signal.SIGKILL)
    coordinator.send(0, Shutdown(1))
    assert forkserver.expect_exit(pids[0], 5.0)[:2] == (0, 0)


async def test_shutdown_ends_a_rank_that_waits_for_a_stopped_peer(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    os.kill(pids[1], signal.SIGSTOP)
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    await until_inside_collective(coordinator)
    start = time.monotonic()
    coordinator.send(0, Shutdown(1))
    assert forkserver.expect_exit(pids[0], 3.0)[:2] == (0, 0)
    assert time.monotonic() - start < 1.0
    forkserver.kill(pids[1], signal.SIGKILL)
    forkserver.expect_exit(pids[1])


async def test_calls_answer_from_the_main_thread_or_name_what_is_valid(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    await generate(coordinator, [PROMPT], 3)
    coordinator.send(0, Call(1, 1, 5, "expert_load"))
    load = np.array(msgspec.msgpack.decode((await coordinator.expect(CallResult, 0)).value))
    assert load.shape == (MOE_LAYERS, EXPERTS)
    assert load.sum(axis=1).tolist() == [2 * (len(PROMPT) + 2)] * MOE_LAYERS
    coordinator.send(0, Call(1, 1, 6, "reboot"))
    refused = await coordinator.expect(CallResult, 0)
    assert (refused.call_id, refused.ok) == (6, False)
    assert refused.error is not None
    assert (refused.error.kind, refused.error.found) == ("invalid_request", "reboot")
    await stop(forkserver, coordinator, [pid])


async def test_frames_that_do_not_decode_are_counted_and_dropped(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    for frames in ([b""], [b"\x93\x04"], [b"\xc1" * 40, b"more"]):
        coordinator.send_raw(0, frames)
    coordinator.send(0, Call(0, 1, 1, "ping"))  # an older term
    (tokens,) = await generate(coordinator, [PROMPT], 1)
    assert len(tokens) == 1
    stats = await stats_of(coordinator)
    assert stats["socket"]["dropped"] == 3
    assert stats["stale"] == 1
    await stop(forkserver, coordinator, [pid])


async def test_more_steps_than_the_queue_holds_are_a_fault(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"))
    os.kill(pids[1], signal.SIGSTOP)
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    await until_inside_collective(coordinator)
    for number in range(1, INBOX_LIMIT + 4):
        coordinator.send(0, step(number, [1, 0]))
    fault = await coordinator.expect(Fault, 0)
    assert fault.error.kind == "protocol"
    assert f"the limit is {INBOX_LIMIT}" in fault.error.text
    forkserver.kill(pids[1], signal.SIGKILL)
    coordinator.send(0, Shutdown(1))
    assert forkserver.expect_exit(pids[0], 5.0)[:2] == (0, 0)
    forkserver.expect_exit(pids[1])


async def _load_fault(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, config: WorkerConfig
) -> tuple[Fault, str]:
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, config)
    coordinator.send(0, Load(1, NO_EXPERTS))
    fault = await coordinator.expect(Fault, 0)
    code, number, tail = forkserver.expect_exit(pid, 5.0)
    assert (code, number) == (1, 0)
    return fault, tail


async def test_a_missing_model_is_a_fault_and_exit_1(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, tmp_path: Path
) -> None:
    fault, tail = await _load_fault(forkserver, coordinator, worker_config(tmp_path / "nothing"))
    assert fault.error.kind == "invalid_config"
    assert str(tmp_path / "nothing") in fault.error.text
    assert fault.error.traceback
    assert str(tmp_path / "nothing") in tail


async def test_weights_cut_short_are_a_fault_and_exit_1(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoints("qwen3-moe").iterdir():
        data = file.read_bytes()
        (model / file.name).write_bytes(data[:-1000] if file.suffix == ".safetensors" else data)
    fault, _ = await _load_fault(forkserver, coordinator, worker_config(model))
    assert fault.error.kind == "invalid_config"
    assert "bytes" in fault.error.text


async def test_another_protocol_version_is_a_fault_and_exit_1(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.expect(HelloWorker)
    config = worker_config("/nowhere")
    coordinator.send(0, WelcomeWorker(99, 1, config_digest(config), config))
    fault = await coordinator.expect(Fault, 0)
    assert "version 99" in fault.error.text
    assert forkserver.expect_exit(pid, 5.0)[:2] == (1, 0)


async def test_a_worker_started_by_hand_reads_its_token_from_a_file(
    coordinator: CoordinatorEnd, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("from-the-file\n")
    with start_by_hand(3, coordinator.endpoint, token) as process:
        await coordinator.welcome(3, worker_config("/nowhere"))
        hello = coordinator.hellos[3]
        assert (hello.token, hello.pid) == ("from-the-file", process.pid)
        coordinator.send(3, Shutdown(1, "enough"))
        assert process.wait(10) == 0


async def test_empty_steps_are_answered_in_order_without_tokens(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    times = []
    for number in range(300):
        start = time.perf_counter()
        coordinator.send(0, step(number, [0]))
        done = await coordinator.expect(StepDone, 0)
        times.append(1e6 * (time.perf_counter() - start))
        assert len(done.tokens) == 0
    print(f"empty step, plan to result: median {statistics.median(times):.0f} us, best {min(times):.0f} us")
    await stop(forkserver, coordinator, [pid])
