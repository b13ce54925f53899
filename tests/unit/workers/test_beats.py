from __future__ import annotations

from drumline.workers.beats import LOOK_S, WAITED_S, Beats
from drumline.workers.progress import Progress


def run(beats: Beats, progress: Progress, start: float, seconds: float, works: bool = True) -> list[float]:
    """When beats are due, asked whenever they want to be, from ``start`` on for so many seconds."""
    times, now = [], start
    while now <= start + seconds:
        if beats.due(now, progress, works):
            times.append(round(now - start, 3))
        now = max(beats.due_at, now + 1e-6)
    return times


def test_beats_come_once_an_interval_and_a_rank_at_rest_is_not_looked_at() -> None:
    beats, progress = Beats(), Progress()
    beats.start(1.0)
    assert beats.due(100.0, progress, False)
    assert beats.due_at == 101.0
    assert [round(time) for time in run(beats, progress, 101.0, 3.5, works=False)] == [0, 1, 2, 3]


def test_who_waits_in_a_collective_says_so_after_half_a_second_and_once() -> None:
    beats, progress = Beats(), Progress()
    beats.start(10.0)
    beats.due(100.0, progress, False)
    beats.work_comes(100.0)
    progress.begin_step(0, dummy=False)
    progress.enter_collective()
    (told,) = run(beats, progress, 100.0, 5.0)
    assert WAITED_S <= told <= WAITED_S + 2 * LOOK_S
    progress.leave_collective()
    progress.enter_collective()
    assert len(run(beats, progress, 105.0, 3.0)) == 1


def test_who_gets_on_says_nothing_out_of_turn() -> None:
    beats, progress = Beats(), Progress()
    beats.start(10.0)
    beats.due(100.0, progress, False)
    now, told = 100.0, 0
    for number in range(50):
        beats.work_comes(now)
        progress.begin_step(number, dummy=False)
        now += 0.1
        told += beats.due(now, progress, True)
    assert told == 0


def test_looking_ends_with_the_work_and_begins_with_it() -> None:
    beats, progress = Beats(), Progress()
    beats.start(10.0)
    beats.due(100.0, progress, False)
    beats.work_comes(100.0)
    assert beats.due_at == 100.0 + LOOK_S
    assert not beats.due(100.0 + LOOK_S, progress, False)
    assert beats.due_at == 110.0
    beats.work_comes(101.0)
    assert beats.due_at == 101.0 + LOOK_S


def test_a_lease_is_told_at_once_and_so_is_its_end() -> None:
    beats, progress = Beats(), Progress()
    beats.start(10.0)
    beats.due(100.0, progress, False)
    progress.lease_s = 60.0
    assert beats.due(100.1, progress, True)
    assert not beats.due(100.2, progress, True)
    progress.lease_s = 0.0
    assert beats.due(100.3, progress, True)
    beats.start(10.0)
    assert beats.due(100.4, progress, True)
