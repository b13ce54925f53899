"""The planner's process: whatever becomes of it, each request is answered and the next one is solved."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.launch.planner import MAX_ASKED, MODULE, Planner
from drumline.engine.planner_frames import FrameReader, pack_request, plans, requests
from drumline.protocol.errors import ProtocolError
from tests import procfs

FALSE = "tests.unit.engine.false_planner"


def request(number: int = 1, policy: str = "incremental", snapshots: int = 1, experts: int = 8) -> PlanRequest:
    """Two layers on four ranks, the first expert ten times as hot as the last."""
    load = np.tile(np.linspace(10.0, 1.0, experts, dtype=np.float32), (2 * snapshots, 1))
    placement = np.tile(np.arange(experts + 4, dtype=np.int32) % experts, (2, 1))
    slots = np.full(4, (experts + 4) // 4, dtype=np.int32)
    nodes = np.array([0, 0, 1, 1], dtype=np.int32)
    none = np.zeros(0, dtype=np.int32)
    return PlanRequest(number, policy, 2, load, placement, slots, nodes, none, max_moved=1.0, min_gain=0.0)


@pytest.fixture
async def planner() -> AsyncIterator[Planner]:
    planner = Planner(deadline_s=30.0)
    yield planner
    await planner.close()


async def until(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError when the condition does not come true in 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


async def process_of(planner: Planner) -> int:
    """Its pid, once it has one."""
    await until(lambda: planner.pid is not None)
    assert planner.pid is not None
    return planner.pid


async def stopped(planner: Planner) -> int:
    """The pid of its process, which a SIGSTOP has reached."""
    pid = await process_of(planner)
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: procfs.stat(pid)[0] == "T")
    return pid


def is_a_plan(plan: PlacementPlan, number: int) -> bool:
    return plan.error == "" and plan.number == number and bool(plan.reason)


async def test_a_request_is_solved_and_nothing_was_started_before(planner: Planner) -> None:
    assert planner.pid is None
    plan = await planner.plan(request(number=5))
    assert is_a_plan(plan, 5)
    assert plan.balancedness > plan.balancedness_before
    assert plan.slots_moved == len(plan.moves) > 0


async def test_one_process_serves_all_requests_in_turn(planner: Planner) -> None:
    solved = await asyncio.gather(*(planner.plan(request(number)) for number in range(3)))
    pid = planner.pid
    assert all(is_a_plan(plan, number) for number, plan in enumerate(solved))
    assert is_a_plan(await planner.plan(request(3)), 3)
    assert planner.pid == pid


async def test_its_process_steps_back_for_others_and_has_no_torch(planner: Planner) -> None:
    await planner.plan(request())
    pid = await process_of(planner)
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert "torch" not in procfs.maps(pid)


async def test_a_load_larger_than_any_pipe_arrives(planner: Planner) -> None:
    assert is_a_plan(await planner.plan(request(snapshots=2000, experts=256)), 1)


async def test_a_process_killed_in_a_solve_is_told_and_the_next_request_is_solved(planner: Planner) -> None:
    asked = asyncio.create_task(planner.plan(request()))
    os.kill(await stopped(planner), signal.SIGKILL)
    lost = await asked
    assert "ended with signal 9" in lost.error
    assert lost.placement.tolist() == request().placement.tolist()
    assert is_a_plan(await planner.plan(request(2)), 2)


async def test_a_process_killed_while_idle_is_replaced(planner: Planner) -> None:
    await planner.plan(request())
    pid = await process_of(planner)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: planner.pid is None)
    assert is_a_plan(await planner.plan(request(2)), 2)
    assert planner.pid != pid


async def test_a_stopped_process_is_given_up_at_the_deadline() -> None:
    planner = Planner(deadline_s=0.4)
    asked = asyncio.create_task(planner.plan(request()))
    pid = await stopped(planner)
    assert (await asked).error == "the planner took longer than 0.4 s"
    await planner.close()
    assert pid not in procfs.pids()


async def test_a_cancelled_request_ends_its_solve_and_not_the_next(planner: Planner) -> None:
    asked = asyncio.create_task(planner.plan(request()))
    pid = await stopped(planner)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert is_a_plan(await planner.plan(request(2)), 2)
    assert planner.pid != pid


async def test_more_requests_than_may_wait_are_refused_at_once(planner: Planner) -> None:
    asked = [asyncio.create_task(planner.plan(request(number))) for number in range(MAX_ASKED)]
    pid = await stopped(planner)
    assert "8 requests wait" in (await planner.plan(request(99))).error
    os.kill(pid, signal.SIGCONT)
    assert all(is_a_plan(plan, number) for number, plan in enumerate(await asyncio.gather(*asked)))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("garbage", "is no plan: a frame that does not decode"),
        ("oversized", "is no plan: a frame of 4294967295 bytes"),
        ("another's", "answered request 1 for"),
        ("misshapen", "with plan 1 of (1, 1)"),
        ("exit", "ended with code 7"),
    ],
)
async def test_an_answer_that_is_none_is_an_error_and_ends_the_process(policy: str, said: str) -> None:
    planner = Planner(deadline_s=30.0, module=FALSE)
    lost = await planner.plan(request(1, policy))
    assert said in lost.error
    assert planner.pid is None
    await planner.close()


async def test_an_answer_too_many_ends_the_process() -> None:
    planner = Planner(deadline_s=30.0, module=FALSE)
    assert (await planner.plan(request(1, "twice"))).error == ""
    await until(lambda: planner.pid is None)
    await planner.close()


async def test_a_policy_that_is_none_is_an_error_of_the_request_alone(planner: Planner) -> None:
    assert "astrology" in (await planner.plan(request(1, "astrology"))).error
    pid = planner.pid
    assert is_a_plan(await planner.plan(request(2)), 2)
    assert planner.pid == pid


async def test_a_closed_planner_answers_what_was_asked_and_solves_no_more(planner: Planner) -> None:
    asked = asyncio.create_task(planner.plan(request()))
    pid = await stopped(planner)
    await planner.close()
    assert (await asked).error == (await planner.plan(request())).error == "the planner is closed"
    assert pid not in procfs.pids()
    await planner.close()


OWNER = """
import asyncio, sys
from drumline.engine.launch.planner import Planner
from tests.unit.engine.test_planner import request, process_of

async def main():
    planner = Planner()
    asked = asyncio.create_task(planner.plan(request()))
    print(await process_of(planner), flush=True)
    await asked
    print("solved", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_process_ends_with_its_owner_in_a_solve_too() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert owner.stdout.readline() == "solved\n"
        os.kill(pid, signal.SIGSTOP)  # it can read no end of its stdin: the kernel alone ends it
        owner.kill()
    deadline = time.monotonic() + 5
    while procfs.is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not procfs.is_alive(pid)


def test_the_process_ends_with_its_stdin_and_at_once_when_another_owns_it() -> None:
    for owner in (os.getpid(), 1):
        arguments = [sys.executable, "-m", MODULE, str(owner)]
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (0 if owner == os.getpid() else 1, b"")


def test_frames_are_cut_wherever_the_stream_is() -> None:
    stream = pack_request(request(1)) + pack_request(request(2))
    reader = FrameReader()
    frames = [frame for at in range(0, len(stream), 7) for frame in reader.feed(stream[at : at + 7])]
    assert [requests.decode([frame]).number for frame in frames] == [1, 2]
    with pytest.raises(ProtocolError, match="the limit is"):
        reader.feed(b"\x7f\0\0\0")
    with pytest.raises(ProtocolError):
        plans.decode([frames[0]])
