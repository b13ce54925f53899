"""A coordinator that follows another one, to ranks that live already."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from drumline.engine.core.decisions import Ended, EpochReady, FaultSeen, ToPeer
from drumline.engine.core.members import RankState
from drumline.engine.core.membership import GATHER_S
from drumline.protocol.layout import Layout
from drumline.protocol.messages import Configure, Load, Shutdown, Spawn, Started, WelcomeWorker
from drumline.protocol.placement import initial_placement
from tests.unit.core.fake_ranks import DIGEST, FakeRanks, Process, config

TWO_BY_TWO = Layout(2, 1, 2, enable_expert_parallel=True)


def living(rank: int) -> Process:
    """A process that has loaded its share, and computed in epoch 7 of the term before."""
    held = initial_placement(2, 8, 4)[:, 2 * rank : 2 * rank + 2]
    return Process(rank, 500 + rank, f"old-{rank}", term=4, epoch=7, held=held)


def taking_over(*lived: int, slow: Collection[int] = ()) -> FakeRanks:
    """The supervisor has said which ranks live; they have not said Hello."""
    ranks = FakeRanks(config(TWO_BY_TWO))
    ranks.slow = set(slow)
    for rank in lived:
        ranks.processes[rank] = living(rank)
    return ranks.start([Started(rank, 500 + rank, f"old-{rank}") for rank in lived])


def hello_again(ranks: FakeRanks, rank: int, **more: object) -> None:
    process = ranks.processes[rank]
    values: dict[str, object] = {"term": 4, "epoch": 7, "loaded": True, "digest": DIGEST}
    ranks.pump(ranks.hello(process, **(values | more)))


def test_ranks_that_live_are_neither_started_nor_loaded_again_and_epochs_number_on() -> None:
    ranks = taking_over(0, 1, 2, 3)
    assert ranks.membership.took_over
    assert not ranks.said(Spawn)
    for rank in range(4):
        assert not ranks.said(EpochReady)
        hello_again(ranks, rank)
    assert len(ranks.said(WelcomeWorker)) == 4
    assert not ranks.said(Load)
    assert ranks.said(EpochReady) == [EpochReady(0, 8, {0: 9, 1: 10, 2: 11, 3: 12}, (0, 1), ())]
    assert ranks.said(Configure)[0].fetches.shape == (0, 4)
    loaded = ranks.membership.ranks[3].loaded
    assert loaded is not None
    assert (loaded.num_blocks, loaded.device) == (12, "cpu")


def test_ranks_that_do_not_live_are_started_and_not_waited_for() -> None:
    ranks = taking_over(0, 1, slow={2, 3})
    assert [spawn.rank for spawn in ranks.said(Spawn)] == [2, 3]
    hello_again(ranks, 0)
    hello_again(ranks, 1)
    assert ranks.said(EpochReady) == [EpochReady(0, 8, {0: 9, 1: 10}, (0,), ())]


def test_ranks_that_lived_are_waited_for_no_longer_than_a_moment() -> None:
    ranks = taking_over(0, 1, 2, 3)
    for rank in (0, 1, 2):
        hello_again(ranks, rank)
    ranks.wait(GATHER_S - 0.1, beating=[0, 1, 2])
    assert not ranks.said(EpochReady)
    ranks.wait(0.2, beating=[0, 1, 2])
    assert ranks.said(EpochReady)[0].serving == (0,)
    assert [member.rank for member in ranks.said(Configure)[0].parked] == [2]


def test_ranks_of_a_job_that_lived_are_waited_for_as_long() -> None:
    ranks = FakeRanks(config(TWO_BY_TWO, external_ranks=frozenset(range(4)), launch_token="job"))
    for rank in range(4):
        ranks.processes[rank] = living(rank)
        ranks.processes[rank].token = "job"
    ranks.start()
    for rank in (0, 1, 2):
        hello_again(ranks, rank)
    ranks.wait(GATHER_S - 0.1, beating=[0, 1, 2])
    assert not ranks.said(EpochReady)
    hello_again(ranks, 3)
    assert ranks.said(EpochReady)[0].serving == (0, 1)


def test_a_rank_that_lived_and_never_says_hello_is_killed_at_the_start_deadline() -> None:
    ranks = taking_over(0, 1, 2, 3)
    for rank in (0, 1, 2):
        hello_again(ranks, rank)
    ranks.wait(60.5, beating=[0, 1, 2])
    assert not ranks.said(Ended)
    assert ranks.killed == [503]
    assert [(fault.rank, fault.kind) for fault in ranks.said(FaultSeen)] == [(3, "wedged")]
    assert [spawn.rank for spawn in ranks.said(Spawn)] == [3]


def test_a_rank_of_another_configuration_is_replaced() -> None:
    ranks = taking_over(0, 1, 2, 3)
    ranks.slow = {3}
    hello_again(ranks, 3, digest="old")
    assert ranks.killed == [503]
    assert [spawn.rank for spawn in ranks.said(Spawn)] == [3]
    assert not ranks.said(Ended)


def test_a_rank_that_was_loading_is_told_to_load() -> None:
    ranks = taking_over(0, 1, 2, 3)
    ranks.slow = {3}
    hello_again(ranks, 3, loaded=False, digest="")
    assert len(ranks.said(Load)) == 1
    assert ranks.membership.ranks[3].state is RankState.STARTING


def test_a_rank_that_is_back_before_the_supervisor_is_not_turned_away() -> None:
    ranks = FakeRanks(config(TWO_BY_TWO))
    for rank in range(4):
        ranks.processes[rank] = living(rank)
        hello_again(ranks, rank)
    assert ranks.out == []
    ranks.start([Started(rank, 500 + rank, f"old-{rank}") for rank in range(4)])
    assert not ranks.said(Shutdown)
    assert ranks.said(EpochReady)[0].serving == (0, 1)


def test_a_process_that_the_supervisor_does_not_know_is_turned_away() -> None:
    ranks = taking_over(0, 1)
    ranks.processes[2] = living(2)
    ranks.forget()
    hello_again(ranks, 2)
    (output,) = ranks.said(ToPeer)
    assert isinstance(output.message, Shutdown)
    assert not ranks.processes[2].alive


def test_a_rank_of_a_newer_coordinator_is_left_to_it() -> None:
    ranks = taking_over(0)
    ranks.forget()
    hello_again(ranks, 0, term=6)
    assert ranks.out == []
    assert ranks.membership.refusals.stale == 1


def test_a_start_with_requests_that_wait_is_not_given_up_and_goes_on_with_who_can() -> None:
    ranks = FakeRanks(config(Layout(2, 1, 1, enable_expert_parallel=True), restart_limit=1), unfinished=True)
    ranks.slow = {1}
    ranks.start()
    ranks.kill(1, signal=0, code=1)
    assert not ranks.said(Ended)
    assert not ranks.said(EpochReady)
    ranks.kill(1, signal=0, code=1)
    assert ranks.events("crash_loop")
    assert ranks.said(EpochReady) == [EpochReady(0, 1, {0: 9}, (0,), ())]


def test_a_rank_that_has_loaded_for_the_coordinator_before_has_loaded() -> None:
    ranks = taking_over(0, 1, 2, 3, slow={3})
    hello_again(ranks, 3, loaded=False)
    told_before = msgspec.structs.replace(ranks.loaded(ranks.processes[3]), term=4)
    assert ranks.say(3, told_before) != []
    assert ranks.membership.ranks[3].state is RankState.PARKED
