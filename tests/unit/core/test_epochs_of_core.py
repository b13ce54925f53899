"""Epochs that end early: rows are stated anew at their last acknowledged token, or their requests go elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from drumline.engine.core.wave import WaveState
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Accepted
from tests.unit.core.driver import Driver, ends_of, prefills, tokens_of


def reopen(driver: Driver, epoch: int, lost: list[int], serving: list[int], kept: list[int], group: int = 0) -> None:
    driver.core.close_epoch(group, lost, 0.0)
    driver.steps.clear()
    driver.core.open_epoch(group, epoch, serving, kept)


def test_a_kept_replica_states_its_rows_anew_and_computes_one_token_of_each_that_decoded() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 6)
    driver.plan()
    driver.plan()
    driver.answer([5])  # the second step is in flight
    driver.plan()
    reopen(driver, 2, [], [0], [0])
    step = driver.plan()[0]
    (admit,) = step.admitted
    assert (step.step, admit.row, admit.tokens.tolist()) == (0, 0, [*range(100, 106), 5])
    assert (admit.num_cached, admit.prompt_len, admit.blocks.tolist()) == (6, 6, [0, 1])
    assert (prefills(step), step.num_tokens_across_dp.tolist(), step.append_rows.tolist()) == ({0: 1}, [1], [])
    assert tokens_of(driver.answer([6])) == [(1, 1, 6)]


def test_a_row_in_the_middle_of_its_prefill_goes_on_behind_the_last_acknowledged_chunk() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 40)
    driver.plan()
    driver.plan()
    driver.answer([])
    reopen(driver, 2, [], [0], [0])
    step = driver.plan()[0]
    (admit,) = step.admitted
    assert (admit.num_cached, len(admit.blocks), prefills(step)) == (16, 8, {0: 16})


def test_rows_that_find_no_room_in_the_first_step_are_stated_there_and_compute_later() -> None:
    driver = Driver(max_num_batched_tokens=8, async_scheduling=True, enable_prefix_caching=False)
    driver.accept("a", 8)
    driver.accept("b", 6)
    driver.plan()
    driver.plan()
    reopen(driver, 2, [], [0], [0])
    first, second = driver.plan()[0], driver.plan()[0]
    assert [admit.row for admit in first.admitted] == [0, 1]
    assert (prefills(first), prefills(second)) == ({0: 8}, {1: 6})
    assert (first.num_tokens_across_dp.tolist(), second.num_tokens_across_dp.tolist()) == ([8], [7])


def test_blocks_of_the_void_steps_go_back_to_the_pool() -> None:
    driver = Driver(async_scheduling=True, enable_prefix_caching=False)
    driver.accept("a", 8)
    driver.plan()
    driver.plan()  # takes a third block
    assert driver.core.replica_status()[0].blocks_free == 13
    driver.answer([5])
    driver.core.close_epoch(0, [], 0.0)
    assert driver.core.replica_status()[0].blocks_free == 14


def test_a_void_preemption_stands() -> None:
    driver = Driver(num_blocks=(4,), max_num_batched_tokens=8, async_scheduling=True, enable_prefix_caching=False)
    driver.accept("old", 7, max_tokens=9)
    driver.accept("young", 7, max_tokens=9)
    while driver.core.counters()["preemptions"] == 0:
        if not driver.plan() or driver.core.counters()["preemptions"]:
            continue
        driver.answer([5] * _sampling(driver))
    reopen(driver, 2, [], [0], [0])
    step = driver.plan()[0]
    assert [admit.tokens[:7].tolist() for admit in step.admitted] == [[*range(100, 107)]]
    assert step.evicted.tolist() == []
    assert [status.waiting for status in driver.core.replica_status()] == [1]


def _sampling(driver: Driver) -> int:
    record = driver.core._groups[0].in_flight[0]
    return len(record.rows)


def test_requests_of_a_lost_replica_go_on_on_the_one_that_serves() -> None:
    driver = Driver(num_blocks=(16, 16), enable_prefix_caching=False)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.accept("b", 4, data_parallel_rank=1)
    driver.run([5], [6])
    reopen(driver, 2, [1], [0], [0])
    ((replica, step),) = driver.core.plan(0.0)
    assert (replica, step.num_tokens_across_dp.tolist()) == (0, [6])
    by_row = {admit.row: (admit.tokens.tolist(), admit.num_cached) for admit in step.admitted}
    assert by_row == {0: ([100, 101, 102, 103, 5], 4), 1: ([100, 101, 102, 103, 6], 0)}
    driver.core.apply(0, driver.done(0, step, [7, 8]), 0.0)
    assert tokens_of(driver.core.outputs()) == [(1, 1, 7), (2, 1, 8)]


def test_requests_move_to_another_lockstep_group_at_once() -> None:
    driver = Driver(num_blocks=(16, 16), lockstep=False)
    driver.accept("a", 4, data_parallel_rank=0, n=2, priority=3)
    driver.run([5, 6])
    driver.core.close_epoch(0, [0], 0.0)
    ((replica, step),) = driver.core.plan(0.0)
    assert (replica, [admit.tokens[-1] for admit in step.admitted]) == (1, [5, 6])
    assert [status.running for status in driver.core.replica_status()] == [0, 2]
    assert driver.core._groups[0].unfinished == 0
    driver.core.apply(1, driver.done(1, step, [2, 2]), 0.0)
    assert [end[:4] for end in ends_of(driver.core.outputs())] == [("a", 0, "stop", 2), ("a", 1, "stop", 2)]
    assert driver.core.idle


def test_with_nothing_serving_requests_wait_and_new_ones_are_accepted() -> None:
    driver = Driver(max_waiting=3)
    driver.accept("a", 4)
    driver.run([5])
    driver.core.close_epoch(0, [0], 0.0)
    assert driver.core.serving == frozenset()
    driver.accept("b", 4, n=2)
    assert driver.refuse("c", 4).error.kind == "queue_full"
    assert driver.core.plan(0.0) == []
    driver.core.open_epoch(0, 2, [0], [])
    assert driver.core.serving == {0}
    step = driver.plan()[0]
    assert [len(admit.tokens) for admit in step.admitted] == [5, 4, 4]


def test_a_request_pinned_to_a_replica_that_does_not_serve_goes_elsewhere() -> None:
    driver = Driver(num_blocks=(16, 16))
    reopen(driver, 2, [1], [0], [0])
    driver.accept("a", 4, data_parallel_rank=1)
    ((replica, step),) = driver.core.plan(0.0)
    assert (replica, len(step.admitted)) == (0, 1)


def test_a_request_waits_for_a_replica_that_is_large_enough() -> None:
    driver = Driver(num_blocks=(16, 4))
    driver.accept("long", 4, max_tokens=40, data_parallel_rank=0)
    reopen(driver, 2, [0], [1], [1])
    assert driver.core.plan(0.0) == []
    reopen(driver, 3, [], [0, 1], [1])
    assert [len(step.admitted) for step in driver.plan()] == [1, 0]


def test_answers_of_replicas_that_do_not_serve_or_of_a_closed_epoch_are_refused() -> None:
    driver = Driver(num_blocks=(16, 16))
    driver.accept("a", 4, data_parallel_rank=0)
    old = driver.plan()[0]
    driver.core.close_epoch(0, [1], 0.0)
    with pytest.raises(ProtocolError, match="does not serve"):
        driver.core.apply(0, driver.done(0, old, [5]), 0.0)
    driver.core.open_epoch(0, 2, [0], [0])
    (_, step), *_ = driver.core.plan(0.0)
    with pytest.raises(ProtocolError, match="does not serve"):
        driver.core.apply(1, driver.done(1, step, []), 0.0)


def test_a_held_group_plans_nothing_and_its_steps_finish() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 4)
    driver.plan()
    driver.core.hold(0, True)
    assert driver.plan() == []
    assert driver.core.in_flight(0) == 1
    driver.answer([5])
    assert driver.core.in_flight(0) == 0
    assert driver.plan() == []
    driver.core.hold(0, False)
    assert len(driver.plan()) == 1


def test_a_wave_does_not_outlive_the_work_that_a_close_takes_away() -> None:
    driver = Driver(num_blocks=(16, 16), lockstep=False)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.run([5])
    driver.core.close_epoch(0, [0], 0.0)
    states = [(group.wave.number, group.wave.state) for group in driver.core._groups]
    assert states[0] == (1, WaveState.PAUSED)


def test_a_wave_goes_on_in_the_next_epoch() -> None:
    driver = Driver()
    driver.accept("a", 4)
    before = driver.run([5])
    reopen(driver, 2, [], [0], [0])
    assert driver.plan()[0].wave == before.wave


def test_what_ends_between_epochs_leaves_nothing_behind() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 4)
    driver.plan()
    driver.plan()
    driver.core.close_epoch(0, [], 0.0)
    driver.cancel("a")
    (output,) = driver.core.outputs()
    assert output.cancelled == [(77, "a")]
    driver.core.open_epoch(0, 2, [0], [0])
    assert driver.core.idle
    assert isinstance(driver.accept("b", 4), Accepted)
    step = driver.plan()[0]
    assert (len(step.admitted), step.evicted.tolist()) == (1, [])


def test_the_cache_of_a_kept_replica_stays_and_that_of_a_lost_one_is_forgotten() -> None:
    driver = Driver(num_blocks=(16, 16))
    for rank in (0, 1):
        driver.accept(f"r{rank}", 8, max_tokens=1, data_parallel_rank=rank)
    driver.run([5], [5])
    reopen(driver, 2, [1], [0, 1], [0])
    for rank in (0, 1):
        driver.accept(f"again{rank}", 9, data_parallel_rank=rank)
    assert [step.admitted[0].num_cached for step in driver.plan()] == [8, 0]


@pytest.mark.parametrize(
    ("serving", "kept"), [([], []), ([0], [1]), ([0, 2], [])], ids=["nobody", "kept but not serving", "no such replica"]
)
def test_an_epoch_of_replicas_that_cannot_be_is_refused(serving: list[int], kept: list[int]) -> None:
    driver = Driver(num_blocks=(16, 16))
    with pytest.raises(ValueError, match="replicas"):
        driver.core.open_epoch(0, 2, serving, kept)


def test_without_chunked_prefill_a_restated_row_is_computed_whole() -> None:
    settings: dict[str, Any] = {"max_model_len": 16, "enable_chunked_prefill": False, "enable_prefix_caching": False}
    driver = Driver(async_scheduling=True, **settings)
    driver.accept("a", 10)
    driver.accept("b", 10)
    driver.plan()
    driver.plan()
    reopen(driver, 2, [], [0], [0])
    first, second = driver.plan()[0], driver.plan()[0]
    assert [admit.row for admit in first.admitted] == [0, 1]
    assert (prefills(first), prefills(second)) == ({0: 10}, {1: 10})


def test_a_replica_that_joins_gets_its_share_of_what_waits() -> None:
    driver = Driver(num_blocks=(16, 16), max_num_seqs=1)
    reopen(driver, 2, [1], [0], [0])
    for name in "abcde":
        driver.accept(name, 4)
    driver.core.plan(0.0)
    reopen(driver, 3, [], [0, 1], [0])
    assert [status.waiting for status in driver.core.replica_status()] == [2, 2]
    steps = driver.plan()
    assert [len(step.admitted) for step in steps] == [1, 1]


def test_requests_that_waited_before_any_group_was_open_are_shared_out_among_groups() -> None:
    driver = Driver(num_blocks=(16, 16), lockstep=False, epoch=False)
    for name in "abcd":
        driver.accept(name, 4)
    driver.core.open_epoch(0, 1)
    driver.core.open_epoch(1, 1)
    assert [status.waiting for status in driver.core.replica_status()] == [2, 2]


def test_a_request_that_waits_goes_back_to_the_replica_that_it_is_pinned_to() -> None:
    driver = Driver(num_blocks=(16, 16), max_num_seqs=1)
    reopen(driver, 2, [1], [0], [0])
    driver.accept("runs", 4)
    driver.core.plan(0.0)
    driver.accept("a", 4, data_parallel_rank=1)
    driver.accept("b", 4, data_parallel_rank=0)
    reopen(driver, 3, [], [0, 1], [0])
    by_replica = [step.admitted for step in driver.plan()]
    assert [len(admitted) for admitted in by_replica] == [1, 1]
    assert driver.core.requests_in_rows(0, 1, [0]) == ("a",)
