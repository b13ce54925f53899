"""What is made of faults: whose they are, what is counted against whom, and who is started again."""

from __future__ import annotations

import pytest

from drumline.engine.core.decisions import Ended, EpochReady, FaultSeen, GroupClosed, ToPeer
from drumline.engine.core.evidence import SECOND_WITHIN
from drumline.engine.core.losses import MOST_MISSED, SETTLE_S
from drumline.engine.core.members import RankState
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout
from drumline.protocol.messages import (
    BeatWorker,
    Configure,
    Exited,
    Fault,
    Injected,
    Kill,
    Leave,
    OpenStore,
    Shutdown,
    Spawn,
    StepDone,
)
from tests.unit.core.fake_ranks import FakeRanks, config
from tests.unit.core.test_membership import EMPTY

FOUR = Layout(4, 1, 1, enable_expert_parallel=True)


def kinds(ranks: FakeRanks) -> list[tuple[int, str]]:
    return [(fault.rank, fault.kind) for fault in ranks.said(FaultSeen)]


def opened(layout: Layout | None = None, **more: object) -> FakeRanks:
    """All ranks compute in epoch 1."""
    ranks = FakeRanks(config(layout, **more)).start()  # type: ignore[arg-type]
    assert ranks.membership.all_ready
    ranks.forget()
    return ranks


@pytest.mark.parametrize(
    ("signal", "code", "inside"),
    [
        *((number, 0, True) for number in (4, 6, 7, 8, 11)),
        *((number, 0, False) for number in (9, 15)),
        (0, 1, True),
        (0, 0, False),
    ],
)
def test_only_deaths_from_inside_count(signal: int, code: int, inside: bool) -> None:
    ranks = opened()
    ranks.kill(1, signal, code)
    (fault,) = ranks.said(FaultSeen)
    assert (fault.kind, fault.inside, fault.epoch) == ("exit", inside, 1)


def test_who_complains_first_is_not_to_blame_when_another_turns_out_to_be_dead() -> None:
    ranks = opened()
    ranks.processes[1].alive = False
    ranks.fault(0, "peer_lost", "connection reset by rank 1")
    assert ranks.said(GroupClosed) == [GroupClosed(0, 1, ())]
    assert not ranks.said(FaultSeen)
    ranks.kill(1)
    (fault,) = ranks.said(FaultSeen)
    assert (fault.rank, fault.kind, fault.epoch) == (1, "exit", 1)
    assert "rank 0 reports: connection reset by rank 1" in fault.evidence
    assert ranks.said(EpochReady) == [EpochReady(0, 3, {0: 9}, (0,), (0,))]


def test_a_rank_that_does_not_leave_in_time_is_the_one_that_the_others_missed() -> None:
    ranks = opened()
    ranks.processes[1].mute = {Leave}
    ranks.fault(0, "group_timeout", "waited for rank 1")
    assert ranks.membership.due_at == 2.0
    ranks.now = 2.0
    ranks.pump(ranks.membership.tick(2.0))
    assert kinds(ranks) == [(1, "wedged")]
    assert "has not come out of its epoch for epoch 2 within 2.0 s; rank 0 reports" in ranks.said(FaultSeen)[0].evidence
    assert len(ranks.said(Kill)) == 1
    assert ranks.membership.groups[0].served == (0,)


def test_when_all_leave_the_rank_that_was_furthest_behind_is_named() -> None:
    ranks = opened(FOUR)
    for rank, step in enumerate([8, 8, 6, 7]):
        ranks.say(rank, BeatWorker(5, 1, rank, step, 0, False))
    ranks.fault(0, "group_timeout", "waited for rank 3", step=9)
    (fault,) = ranks.said(FaultSeen)
    assert (fault.rank, fault.kind, fault.step, fault.inside) == (2, "peer_lost", 9, False)
    assert "says nothing while others wait for it; rank 0 reports: waited for rank 3" in fault.evidence
    assert ranks.said(EpochReady)[0].serving == (0, 1, 2, 3)
    assert ranks.said(EpochReady)[0].kept == (0, 1, 2, 3)


def test_a_complaint_of_an_epoch_that_is_over_changes_nothing() -> None:
    ranks = opened()
    ranks.fault(1, text="broken")
    ranks.forget()
    ranks.fault(0, "epoch_aborted", "aborted", epoch=1)
    assert ranks.out == []


def test_ranks_that_cannot_meet_though_none_is_lost_are_not_asked_for_ever() -> None:
    ranks = opened()
    ranks.processes[0].mute = {Configure}
    ranks.fault(0, "peer_lost", "gone")
    for _ in range(MOST_MISSED - 1):  # it was not heard of when rank 0 missed it: that is one
        ranks.fault(1, "store", "the store cannot be reached")
        assert not ranks.said(Kill)
    ranks.fault(1, "store", "the store cannot be reached")
    assert len(ranks.said(Kill)) == 1
    assert ranks.membership.ranks[1].restarts == 1


def test_a_first_exception_keeps_the_process() -> None:
    ranks = opened()
    ranks.fault(1, text="index out of range", step=4)
    (fault,) = ranks.said(FaultSeen)
    assert (fault.rank, fault.kind, fault.step, fault.inside) == (1, "exception", 4, False)
    assert ranks.said(GroupClosed) == [GroupClosed(0, 1, ())]
    assert ranks.said(EpochReady)[0].kept == (0, 1)
    assert not ranks.said(Spawn)


@pytest.mark.parametrize(("steps", "killed"), [(SECOND_WITHIN, True), (SECOND_WITHIN + 1, False)])
def test_a_second_exception_within_a_hundred_steps_across_epochs_kills(steps: int, killed: bool) -> None:
    ranks = opened()
    ranks.fault(1)
    ranks.steps(1, steps)
    ranks.fault(1)
    assert ranks.membership.groups[0].epoch == 3
    assert [fault.inside for fault in ranks.said(FaultSeen)] == [False, killed]
    assert bool(ranks.said(Kill)) == killed
    assert len(ranks.said(Spawn)) == int(killed)


def test_an_exception_for_lack_of_memory_comes_from_inside() -> None:
    ranks = opened()
    ranks.fault(1, text="RuntimeError: step failed", traceback="...\ntorch.OutOfMemoryError: CUDA out of memory\n")
    assert [fault.inside for fault in ranks.said(FaultSeen)] == [True]
    assert not ranks.said(Kill)


def test_numbers_that_are_not_finite_are_never_held_against_the_rank() -> None:
    ranks = opened()
    for epoch in (1, 2, 3):
        fault = Fault(5, epoch, 1, ErrorInfo(kind="numeric", text="NaN in row 3"), rows=(3,))
        ranks.pump(ranks.say(1, fault))
    assert [(fault.kind, fault.rows, fault.inside) for fault in ranks.said(FaultSeen)] == [("numeric", (3,), False)] * 3
    assert not ranks.said(Kill)
    assert ranks.membership.groups[0].epoch == 4


def test_an_exception_that_is_told_after_its_consequence_is_still_its_rank_s() -> None:
    ranks = opened()
    ranks.processes[1].mute = {Leave}
    ranks.fault(0, "peer_lost", "rank 1 is gone")
    ranks.fault(1, text="broken", epoch=1)
    assert kinds(ranks) == [(1, "exception")]
    assert ranks.membership.groups[0].epoch == 2


def test_the_end_of_a_process_explains_why_its_connection_is_gone() -> None:
    ranks = opened()
    lost = ErrorInfo(kind="request_failed", text="rank 1 cannot be reached", rank=1, epoch=1, step=7)
    ranks.pump(ranks.membership.declare_lost(1, "unreachable", lost, ranks.now))
    assert ranks.said(GroupClosed) == [GroupClosed(0, 1, (1,))]
    assert not ranks.said(FaultSeen)
    assert not ranks.said(Kill)
    pid = ranks.dead[0].pid
    ranks.pump(ranks.membership.exited(Exited(1, pid, 0, 11), ranks.now))
    (fault,) = ranks.said(FaultSeen)
    assert (fault.kind, fault.inside, fault.epoch, fault.step) == ("exit", True, 1, 7)
    ranks.wait(1.0)
    assert len(ranks.said(FaultSeen)) == 1


def test_a_process_that_lives_on_without_connection_is_killed_after_a_moment() -> None:
    ranks = opened()
    lost = ErrorInfo(kind="request_failed", text="rank 1 leaves messages unread", rank=1, epoch=1)
    ranks.pump(ranks.membership.declare_lost(1, "unreachable", lost, ranks.now))
    assert ranks.membership.due_at == SETTLE_S
    ranks.now = SETTLE_S
    ranks.pump(ranks.membership.tick(SETTLE_S))
    assert kinds(ranks) == [(1, "unreachable")]
    assert ranks.killed == [ranks.dead[0].pid]


def test_who_is_declared_lost_again_is_lost_once() -> None:
    ranks = opened(restart_limit=0)
    lost = ErrorInfo(kind="request_failed", text="stuck", rank=1)
    ranks.pump(ranks.membership.declare_lost(1, "wedged", lost, ranks.now))
    ranks.forget()
    assert ranks.membership.declare_lost(1, "wedged", lost, ranks.now) == []


def test_a_sleeper_that_wakes_is_told_once_that_its_place_is_taken() -> None:
    ranks = opened()
    ranks.kills_work = False
    ranks.slow = {1}
    sleeper = ranks.processes[1]
    stuck = ErrorInfo(kind="request_failed", text="rank 1 is stuck", rank=1, epoch=1)
    ranks.pump(ranks.membership.declare_lost(1, "wedged", stuck, ranks.now))
    ranks.forget()
    beat = BeatWorker(5, 1, 1, 0, 0, False)
    (output,) = ranks.membership.receive(sleeper.peer, beat, 3.0)
    assert isinstance(output, ToPeer)
    assert output.peer == sleeper.peer
    assert isinstance(output.message, Shutdown)
    assert "is taken: rank 1 is stuck" in output.message.reason
    assert ranks.membership.receive(sleeper.peer, beat, 3.1) == []
    assert not ranks.membership.accepts(sleeper.peer, StepDone(5, 1, 1, 0, EMPTY, EMPTY))
    assert ranks.membership.refusals.fenced == 3


def test_what_a_rank_said_of_its_own_end_is_told_though_the_end_was_known_before() -> None:
    ranks = opened()
    victim = ranks.kill(1)
    assert ranks.events("injected") == []
    ranks.pump(ranks.membership.receive(victim.peer, Injected(5, 1, victim.incarnation, 7, "kill at decode"), 3.0))
    assert ranks.events("injected") == ["rank 1: injected fault 7: kill at decode"]
    ranks.forget()
    ranks.pump(ranks.membership.receive(b"stranger", Injected(5, 1, victim.incarnation, 8, "kill at decode"), 3.1))
    assert ranks.events("injected") == []


def test_a_reply_of_a_sleeper_is_answered_at_the_next_occasion() -> None:
    ranks = opened()
    ranks.kills_work = False
    sleeper = ranks.processes[1]
    ranks.wait(3.0)
    stuck = ErrorInfo(kind="request_failed", text="stuck", rank=1, epoch=1)
    ranks.pump(ranks.membership.declare_lost(1, "wedged", stuck, ranks.now))
    ranks.beat()
    assert not ranks.membership.accepts(sleeper.peer, StepDone(5, 1, 1, 0, EMPTY, EMPTY))
    assert ranks.membership.due_at == 3.0
    (output,) = ranks.membership.tick(3.0)
    assert isinstance(output, ToPeer)
    assert isinstance(output.message, Shutdown)


def test_a_silent_rank_is_lost() -> None:
    ranks = opened()
    ranks.wait(11.0, beating=[0])
    assert kinds(ranks) == [(1, "wedged")]
    assert "has not been heard for 10 s" in ranks.said(FaultSeen)[0].evidence


def test_of_ranks_that_do_not_meet_the_one_that_is_not_heard_is_lost() -> None:
    ranks = opened(FOUR)
    ranks.processes[2].mute = {Configure}
    ranks.processes[3].mute = {Configure}
    ranks.fault(0)
    ranks.wait(2.9, beating=[0, 1, 3])
    assert not ranks.said(Kill)
    ranks.wait(0.2, beating=[0, 1, 3])
    assert kinds(ranks) == [(0, "exception"), (2, "wedged")]


def test_of_ranks_that_do_not_meet_and_are_heard_one_is_lost_when_their_time_is_over() -> None:
    ranks = opened(FOUR)
    ranks.processes[2].mute = {Configure}
    ranks.fault(0)
    ranks.wait(9.9)
    assert not ranks.said(Kill)
    ranks.wait(0.2)
    assert kinds(ranks) == [(0, "exception"), (2, "wedged")]


def test_a_rank_that_reads_experts_while_its_epoch_forms_has_time_for_it() -> None:
    ranks = opened()
    ranks.processes[1].mute = {Configure}
    ranks.fault(0)
    for second in range(1, 30):
        ranks.pump(ranks.say(1, BeatWorker(5, 2, 1, 0, 0, False, second, 100)))
        ranks.wait(1.0)
    assert not ranks.said(Kill)
    ranks.wait(10.5)
    assert len(ranks.said(Kill)) == 1


def test_a_store_that_does_not_open_costs_its_host() -> None:
    ranks = opened()
    ranks.processes[0].mute = {OpenStore}
    ranks.fault(1)
    ranks.wait(5.0)
    assert kinds(ranks) == [(1, "exception"), (0, "wedged")]


def test_a_second_fault_while_the_epoch_forms_begins_the_next() -> None:
    ranks = opened(FOUR)
    ranks.slow = {1, 2}
    ranks.processes[3].mute = {Configure}
    ranks.kill(1)
    assert ranks.membership.groups[0].epoch == 2
    ranks.processes[3].mute = set()
    ranks.kill(2)
    assert ranks.said(GroupClosed) == [GroupClosed(0, 1, (1,)), GroupClosed(0, 2, (1, 2))]
    (ready,) = ranks.said(EpochReady)
    assert (ready.epoch, ready.serving, ready.kept) == (3, (0, 3), (0, 3))


def test_without_a_whole_replica_the_group_waits_for_the_replacement() -> None:
    ranks = opened(Layout(1, 1, 2, enable_expert_parallel=True))
    ranks.slow = {1}
    ranks.kill(1)
    assert not ranks.said(EpochReady)
    assert len(ranks.said(Leave)) == 1  # who is left comes out of its collectives
    assert ranks.membership.waiting_for == "group 0 waits for rank 1 (starting)"
    ranks.load(1)
    (ready,) = ranks.said(EpochReady)
    assert (ready.serving, ready.kept) == ((0,), ())
    assert ranks.membership.waiting_for == ""
    assert len(ranks.events("recovered")) == 1


def test_who_loads_while_others_leave_joins_in_the_epoch_after() -> None:
    ranks = opened(FOUR)
    ranks.slow = {1}
    ranks.kill(1)
    ranks.processes[3].mute = {Leave}
    ranks.fault(2)
    ranks.forget()
    ranks.load(1)
    assert not ranks.said(EpochReady)
    ranks.processes[3].mute = set()
    ranks.wait(2.0)
    assert ranks.said(EpochReady)[0].serving == (0, 1, 2)


def test_a_dead_rank_of_a_dense_model_stops_only_its_own_replica() -> None:
    ranks = opened(Layout(2), dense=True)
    ranks.slow = {1}
    ranks.kill(1)
    assert ranks.said(GroupClosed) == [GroupClosed(1, 1, (0,))]
    assert ranks.membership.groups[0].is_open
    ranks.load(1)
    assert ranks.said(EpochReady) == [EpochReady(1, 3, {1: 10}, (0,), ())]


def test_restarts_pause_longer_and_longer_and_end_in_a_crash_loop_while_others_serve() -> None:
    ranks = opened(restart_limit=3)
    at: list[float] = []
    for _ in range(4):
        ranks.slow = {1}
        before = len(ranks.said(Spawn))
        ranks.kill(1)
        begun = ranks.now
        while len(ranks.said(Spawn)) == before and ranks.now < begun + 5.0:
            ranks.wait(0.1)
        at.append(round(ranks.now - begun, 3))
    assert at[:3] == [0.0, 0.5, 1.0]
    assert len(ranks.said(Spawn)) == 3
    (text,) = ranks.events("crash_loop")
    assert "3 restarts within 10 minutes" in text
    assert not ranks.said(Ended)
    assert ranks.membership.ranks[1].state is RankState.DEAD
    ranks.wait(600.0)
    assert len(ranks.said(Spawn)) == 4


def test_an_engine_in_which_nobody_can_compute_any_more_ends_and_names_the_rank() -> None:
    ranks = opened(Layout(1, 1, 2, enable_expert_parallel=True), restart_limit=0)
    ranks.kill(1, signal=11)
    (ended,) = ranks.said(Ended)
    assert ended.error is not None
    assert (ended.error.kind, ended.error.rank) == ("request_failed", 1)
    assert "rank 1 ends whenever it is started" in ended.reason
    assert "SIGSEGV" in ended.reason


def test_a_loss_that_is_forgiven_costs_no_restart() -> None:
    ranks = opened(restart_limit=1)
    ranks.kill(1)
    ranks.membership.forgive(1, ranks.now)
    ranks.kill(1)
    assert len(ranks.said(Spawn)) == 2
    ranks.kill(1)
    assert ranks.events("crash_loop")
    ranks.membership.forgive(1, ranks.now)
    ranks.wait(0.1)
    assert len(ranks.said(Spawn)) == 3


def test_a_rank_that_is_never_started_again_is_not_said_to_have_been() -> None:
    ranks = opened(restart_limit=0)
    ranks.kill(1)
    (text,) = ranks.events("crash_loop")
    assert text.startswith("rank 1 is not started again: restart_limit is 0 and it was lost: ")


def test_a_parked_rank_that_dies_stops_nobody() -> None:
    ranks = opened(Layout(2, 1, 2, enable_expert_parallel=True))
    ranks.slow = {2, 3}
    ranks.kill(3)
    ranks.forget()
    ranks.kill(2)
    assert not ranks.said(GroupClosed)
    assert ranks.membership.groups[0].is_open
    assert kinds(ranks) == [(2, "exit")]


def test_the_same_fault_told_twice_is_one() -> None:
    ranks = opened()
    ranks.processes[1].mute = {Leave}
    fault = Fault(5, 1, 1, ErrorInfo(kind="internal", text="broken"))
    for _ in range(2):
        ranks.pump(ranks.say(1, fault))
    assert kinds(ranks) == [(1, "exception")]
    assert not ranks.said(Kill)


def test_a_process_that_dies_before_it_has_computed_did_not_die_of_a_request() -> None:
    ranks = opened()
    ranks.slow = {1}
    ranks.kill(1)
    ranks.kill(1, signal=11)
    assert [(fault.epoch, fault.inside) for fault in ranks.said(FaultSeen)] == [(1, False), (0, False)]


def test_a_rank_that_is_stopped_while_it_starts_is_replaced() -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    ranks.wait(11.0, beating=[0])
    assert ranks.said(FaultSeen)[0].kind == "wedged"
    assert not ranks.said(Ended)
    assert len(ranks.said(Spawn)) == 3
