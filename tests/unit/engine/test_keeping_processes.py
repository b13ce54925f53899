"""What a supervisor remembers of its workers, and how soon it starts what has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from drumline.engine.launch.restart_limit import LONGEST_PAUSE_S, WINDOW_S, RestartLimit
from drumline.engine.launch.roster import Roster
from drumline.engine.launch.subreaper import children, reap, reap_orphans, runs_module
from drumline.protocol.messages import Exited, Spawned, Started


def test_the_roster_lists_who_lives_with_the_token_it_was_started_with() -> None:
    roster = Roster()
    for rank, pid in ((1, 11), (0, 10)):
        roster.ordered(rank, f"token {rank}")
        assert roster.spawned(Spawned(rank, pid))
    assert list(roster.members) == [Started(0, 10, "token 0"), Started(1, 11, "token 1")]
    assert roster.is_process_of(1, 11)
    assert not roster.is_process_of(0, 11)
    assert roster.exited(Exited(1, 11, 0, 9))
    assert not roster.exited(Exited(1, 11, 0, 9))
    assert list(roster.members) == [Started(0, 10, "token 0")]
    assert not roster.is_process_of(1, 11)


def test_a_replacement_may_come_while_the_old_process_still_dies() -> None:
    roster = Roster()
    for pid, token in ((10, "old"), (20, "new")):
        roster.ordered(0, token)
        assert roster.spawned(Spawned(0, pid))
    assert roster.exited(Exited(0, 10, 0, 9))
    assert roster.members == (Started(0, 20, "new"),)


def test_what_a_lost_coordinator_had_ordered_has_no_place_with_the_next() -> None:
    roster = Roster()
    roster.ordered(0, "of the first")
    roster.ordered(1, "of the first")
    roster.next_coordinator()
    roster.ordered(0, "of the second")
    assert not roster.spawned(Spawned(0, 10))
    assert not roster.exited(Exited(0, 10, 0, 9))
    assert not roster.exited(Exited(1, 0, 1, 0, "fork failed"))
    assert roster.spawned(Spawned(0, 20))
    assert roster.members == (Started(0, 20, "of the second"),)
    assert not roster.spawned(Spawned(5, 50))


def test_a_start_that_failed_is_told_to_who_ordered_it() -> None:
    roster = Roster()
    roster.ordered(0, "t")
    assert roster.exited(Exited(0, 0, 1, 0, "fork failed"))
    assert roster.members == ()


def test_a_process_that_lived_is_started_again_at_once_and_the_limit_is_per_ten_minutes() -> None:
    limit = RestartLimit(3)
    assert [limit.pause(now, lived_s=50.0) for now in (0.0, 100.0, 200.0, 300.0)] == [0.0, 0.0, 0.0, None]
    assert limit.pause(WINDOW_S, lived_s=50.0) == 0.0
    assert limit.pause(WINDOW_S, lived_s=50.0) is None
    assert RestartLimit(0).pause(0.0, lived_s=50.0) is None


def test_processes_that_die_at_once_are_started_more_and_more_slowly() -> None:
    limit = RestartLimit(100)
    pauses = [limit.pause(0.0, lived_s=0.1) for _ in range(9)]
    assert pauses == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert limit.pause(0.0, lived_s=2.0) == 0.0
    assert limit.pause(0.0, lived_s=0.1) == 0.0


@pytest.mark.parametrize(
    ("code", "how"),
    [("raise SystemExit(3)", (3, 0)), ("import os; os.kill(os.getpid(), 9)", (0, int(signal.SIGKILL)))],
)
def test_a_child_is_reaped_with_its_status_or_signal(code: str, how: tuple[int, int]) -> None:
    child = subprocess.Popen([sys.executable, "-c", code])
    assert child.pid in children()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert reap(child.pid) == how
    assert reap(child.pid) is None
    child.returncode = 0


def test_orphans_are_reaped_and_those_that_somebody_waits_for_are_not() -> None:
    ours, orphan = (subprocess.Popen([sys.executable, "-c", "pass"]) for _ in range(2))
    for process in (ours, orphan):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    reap_orphans({ours.pid, *(set(children()) - {orphan.pid})})
    assert orphan.pid not in children()
    assert ours.wait(1) == 0
    orphan.returncode = 0


def test_processes_are_told_apart_by_the_module_that_they_run() -> None:
    assert runs_module(os.getpid(), "pytest") or runs_module(os.getpid(), sys.argv[0])
    assert not runs_module(os.getpid(), "drumline.workers.forkserver")
    assert not runs_module(2**22 + 1, "drumline.workers.forkserver")
