"""Ranks that somebody else starts, and ranks that take turns to load, as membership sees them."""

from __future__ import annotations

import msgspec

from drumline.engine.core.decisions import Ended, EpochReady, FaultSeen, Output
from drumline.engine.core.members import RankState
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout
from drumline.protocol.messages import BeatWorker, Kill, OpenStore, Shutdown, Spawn
from tests.unit.core.fake_ranks import WORKER, FakeRanks, Process, config

TOKEN = "job-token"
THREE = Layout(3, 1, 1, enable_expert_parallel=True)


def world(external: set[int], *, turns: int = 0, layout: Layout = THREE, **more: object) -> FakeRanks:
    """``external`` ranks are started by a job script."""
    worker = msgspec.structs.replace(WORKER, max_parallel_loading_workers=turns)
    values: dict[str, object] = {"worker": worker, "external_ranks": frozenset(external), "launch_token": TOKEN}
    return FakeRanks(config(layout, **(values | more)))  # type: ignore[arg-type]


def come(ranks: FakeRanks, rank: int, pid: int = 0, token: str = TOKEN) -> Process:
    """The job script has started a rank."""
    process = Process(rank, pid or 600 + rank, token)
    former = ranks.processes.get(rank)
    if former is not None:
        ranks.dead.append(former)
    ranks.processes[rank] = process
    ranks.pump(ranks.hello(process))
    return process


def reasons(ranks: FakeRanks) -> list[str]:
    return [message.reason for message in ranks.said(Shutdown)]


def test_only_the_other_ranks_are_spawned() -> None:
    assert [spawn.rank for spawn in world({0, 2}).start().said(Spawn)] == [1]
    assert world({0, 1, 2}).start().said(Spawn) == []


def test_the_token_of_the_job_admits_each_of_its_ranks_once() -> None:
    ranks = world({0, 2}).start()
    assert list(ranks.membership.awaited) == [0, 2]
    come(ranks, 0)
    assert list(ranks.membership.awaited) == [2]
    assert not ranks.said(Shutdown)
    ranks.pump(ranks.hello(Process(0, 700, TOKEN)))
    assert ranks.membership.refusals.duplicate_hello == 1
    assert "it is there already, as process 600 on h" in reasons(ranks)[0]
    come(ranks, 2)
    assert list(ranks.membership.awaited) == []
    assert ranks.said(EpochReady)[0].serving == (0, 1, 2)


def test_the_token_of_the_job_admits_no_rank_that_is_started_here_and_the_reason_is_told() -> None:
    ranks = world({0, 2}).start()
    ranks.pump(ranks.hello(Process(1, 700, TOKEN)))
    ranks.pump(ranks.hello(Process(0, 701, "guess")))
    ranks.pump(ranks.hello(Process(5, 702, TOKEN)))
    assert ranks.membership.refusals.wrong_token == 3
    assert ["starts that rank itself" in reasons(ranks)[0], "wrong launch token" in reasons(ranks)[1]] == [True, True]
    assert "the world has ranks 0 to 2" in reasons(ranks)[2]


def test_ranks_of_a_job_may_come_before_the_supervisor() -> None:
    ranks = world({0, 1, 2})
    for rank in (2, 0, 1):
        come(ranks, rank)
    assert ranks.said(EpochReady)[0].serving == (0, 1, 2)


def test_each_group_has_its_store_at_the_next_port() -> None:
    ranks = world({0, 1, 2, 3}, layout=Layout(2, 1, 2), dense=True, store_port=29500).start()
    for rank in range(4):
        come(ranks, rank)
    assert [store.port for store in ranks.said(OpenStore)] == [29500, 29501]


def test_a_rank_that_no_job_starts_is_named_at_the_start_deadline() -> None:
    ranks = world({0, 2}).start()
    come(ranks, 0)
    ranks.pump(ranks.hello(Process(2, 700, "guess")))
    ranks.wait(60.0)
    (ended,) = ranks.said(Ended)
    assert ended.error is not None
    assert (ended.error.kind, ended.error.rank) == ("start_failed", 2)
    assert "started by a job script" in ended.reason
    assert "1 Hellos came with a wrong launch token" in ended.reason


def test_a_lost_rank_of_a_job_is_not_spawned_but_its_next_process_takes_its_place() -> None:
    ranks = world({2}).start()
    sleeper = come(ranks, 2)
    lost = ErrorInfo(kind="request_failed", text="rank 2 cannot be reached", rank=2, epoch=1)
    ranks.forget()
    ranks.pump(ranks.membership.declare_lost(2, "unreachable", lost, ranks.now))
    assert [fault.kind for fault in ranks.said(FaultSeen)] == ["unreachable"]
    assert not ranks.said(Spawn)
    assert not ranks.said(Kill)
    assert ranks.said(EpochReady)[0].serving == (0, 1)
    assert list(ranks.membership.awaited) == [2]
    come(ranks, 2, pid=800)
    ranks.pump(ranks.membership.drained(0, ranks.now))
    assert ranks.said(EpochReady)[-1].serving == (0, 1, 2)
    assert ranks.said(EpochReady)[-1].kept == (0, 1)
    assert ranks.membership.ranks[2].restarts == 1
    ranks.pump(ranks.membership.receive(sleeper.peer, BeatWorker(5, 1, 2, 0, 0, False), ranks.now))
    assert not sleeper.alive


def test_ranks_of_a_job_are_waited_for_when_nobody_can_compute_without_them() -> None:
    ranks = world({0, 1}, layout=Layout(1, 1, 2, enable_expert_parallel=True), restart_limit=0).start()
    for rank in (0, 1):
        come(ranks, rank)
    lost = ErrorInfo(kind="request_failed", text="gone", rank=1, epoch=1)
    ranks.pump(ranks.membership.declare_lost(1, "unreachable", lost, ranks.now))
    ranks.wait(200.0)
    assert not ranks.said(Ended)
    assert ranks.membership.waiting_for == "group 0 waits for rank 1 (not started)"
    come(ranks, 1, pid=800)
    assert ranks.said(EpochReady)[-1].serving == (0,)


# ---------------------------------------------------------------------------------------------------------------- turns


def loading_in_turns(turns: int) -> FakeRanks:
    """All three ranks are told to load."""
    ranks = world({0, 1, 2}, turns=turns).start()
    ranks.slow = {0, 1, 2}
    for rank in (0, 1, 2):
        come(ranks, rank)
    return ranks


def progress(ranks: FakeRanks, rank: int, done: int) -> list[Output]:
    return ranks.say(rank, BeatWorker(5, 0, rank, 0, 0, False, done, 1000))


def test_a_rank_that_waits_for_its_turn_is_not_lost_while_another_loads() -> None:
    ranks = loading_in_turns(1)
    for done in range(1, 150):
        progress(ranks, 0, done)
        ranks.wait(1.0)
    assert not ranks.said(Ended)


def test_without_turns_the_same_rank_is_named() -> None:
    ranks = loading_in_turns(0)
    for done in range(1, 62):
        progress(ranks, 0, done)
        ranks.wait(1.0)
    assert ranks.said(Ended)[0].reason.startswith("rank 1 ")


def test_of_ranks_that_take_turns_the_one_that_stopped_loading_is_named() -> None:
    ranks = loading_in_turns(1)
    progress(ranks, 1, 900)
    ranks.wait(61.0)
    assert ranks.said(Ended)[0].reason.startswith("rank 1 ")
    assert ranks.membership.ranks[0].state is RankState.STARTING
