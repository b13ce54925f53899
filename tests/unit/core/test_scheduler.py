"""Who computes how much in which step."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.protocol.messages import SamplingSpec
from tests.unit.core.driver import Driver, appended, ends_of, prefills, tokens_of


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_samples_with_the_last() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.accept("a", 20)
    first = driver.run([])
    assert prefills(first) == {0: 8}
    (admit,) = first.admitted
    assert (admit.row, admit.prompt_len, admit.num_cached, admit.blocks.tolist()) == (0, 20, 0, [0, 1])
    assert admit.tokens.tolist() == list(range(100, 120))
    second = driver.run([])
    assert (prefills(second), appended(second), second.admitted) == ({0: 8}, [(0, 2), (0, 3)], ())
    third = driver.run([7])
    assert (prefills(third), appended(third)) == ({0: 4}, [(0, 4)])
    fourth = driver.run([8])
    assert (prefills(fourth), appended(fourth), fourth.num_tokens_across_dp.tolist()) == ({}, [(0, 5)], [1])


def test_rows_that_decode_come_first_and_prefill_gets_what_is_left_of_the_budget() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.accept("a", 4)
    driver.run([7])
    driver.accept("b", 20)
    step = driver.run([8])
    assert (prefills(step), step.num_tokens_across_dp.tolist()) == ({1: 7}, [8])


def test_waiting_requests_are_admitted_by_priority_and_then_by_arrival() -> None:
    driver = Driver(max_num_seqs=1)
    driver.accept("first", 3, max_tokens=1)
    driver.accept("late but urgent", 5, max_tokens=1, priority=-1)
    driver.accept("last", 7, max_tokens=1)
    lengths = [len(driver.run([9]).admitted[0].tokens) for _ in range(3)]
    assert lengths == [5, 3, 7]


def test_no_more_rows_run_than_max_num_seqs() -> None:
    driver = Driver(max_num_seqs=2)
    for name in "abc":
        driver.accept(name, 2, max_tokens=2)
    assert len(driver.run([5, 5]).admitted) == 2
    assert driver.run([5, 5]).admitted == ()
    last = driver.run([5])
    assert (last.evicted.tolist(), [admit.row for admit in last.admitted]) == ([0, 1], [0])


def test_without_chunked_prefill_a_prompt_waits_until_the_budget_holds_all_of_it() -> None:
    driver = Driver([32], max_num_batched_tokens=64, enable_chunked_prefill=False, enable_prefix_caching=False)
    driver.accept("a", 40)
    driver.accept("b", 30)
    assert prefills(driver.run([5])) == {0: 40}
    assert prefills(driver.run([5, 6])) == {1: 30}


def test_the_least_deserving_sequence_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    driver = Driver(num_blocks=[6], enable_prefix_caching=False)
    driver.accept("a", 8, max_tokens=20)
    driver.accept("b", 8, max_tokens=20)
    driver.run([11, 21])
    grown = driver.run([12, 22])
    assert appended(grown) == [(0, 4), (1, 5)]
    for tokens in ([13, 23], [14, 24], [15, 25]):
        driver.run(tokens)
    # Both rows need a fourth block and none is free: b, which came later, gives way.
    step = driver.plan()[0]
    assert (step.evicted.tolist(), appended(step), step.admitted) == ([1], [(0, 2)], ())
    assert driver.core.counters()["preemptions"] == 1
    status = driver.core.replica_status()[0]
    assert (status.running, status.waiting, status.blocks_free) == (1, 1, 2)
    assert tokens_of(driver.answer([16])) == [(1, 5, 16)]
    for token in range(17, 28):  # a fills the whole pool and ends
        driver.run([token])
    (admit,) = driver.plan()[0].admitted
    assert admit.tokens.tolist() == [*range(100, 108), 21, 22, 23, 24, 25]
    assert (admit.prompt_len, admit.num_cached) == (8, 0)


def test_priority_decides_over_arrival_who_is_preempted() -> None:
    driver = Driver(num_blocks=[4], enable_prefix_caching=False)
    driver.accept("unimportant", 8, max_tokens=20, priority=5)
    driver.accept("later", [50, *range(100, 107)], max_tokens=20)
    admitted = driver.run([11, 21]).admitted
    assert [len(admit.tokens) for admit in admitted] == [8, 8]
    # Both need a third block and none is free; the higher number gives way although it arrived first.
    step = driver.plan()[0]
    assert (step.evicted.tolist(), driver.core.replica_status()[0].waiting) == ([1], 1)
    assert tokens_of(driver.answer([12])) == [(2, 1, 12)]


def test_the_token_in_flight_of_a_preempted_row_counts() -> None:
    driver = Driver(num_blocks=[4], async_scheduling=True, enable_prefix_caching=False)
    driver.accept("a", 7, max_tokens=20)
    driver.accept("b", 7, max_tokens=20)
    driver.plan()
    driver.plan()  # both rows compute their eighth token, which fills their two blocks
    driver.answer([11, 21])
    step = driver.plan()[0]
    assert (step.evicted.tolist(), step.num_tokens_across_dp.tolist()) == ([1], [1])
    assert tokens_of(driver.answer([12, 22])) == [(1, 1, 12), (2, 1, 22)]
    driver.cancel("a")
    (admit,) = driver.plan()[0].admitted
    assert admit.tokens.tolist() == [*range(100, 107), 21, 22]


def test_a_preempted_row_whose_token_in_flight_ends_it_is_not_admitted_again() -> None:
    driver = Driver(num_blocks=[4], async_scheduling=True)
    driver.accept("a", 7, max_tokens=20)
    driver.accept("b", 7, max_tokens=20)
    driver.plan()
    driver.plan()
    driver.answer([11, 21])
    driver.plan()
    assert ends_of(driver.answer([12, 2])) == [("b", 0, "stop", 2, 2)]
    assert driver.core.replica_status()[0].waiting == 0


def test_rows_whose_last_token_is_in_flight_give_up_their_blocks_before_anyone_is_preempted() -> None:
    driver = Driver(num_blocks=[4], async_scheduling=True, enable_prefix_caching=False)
    driver.accept("ends", 7, max_tokens=2)
    driver.accept("goes on", 7, max_tokens=9)
    driver.plan()
    driver.plan()
    driver.answer([11, 21])
    step = driver.plan()[0]
    assert (step.evicted.tolist(), len(appended(step))) == ([0], 1)
    assert driver.core.counters()["preemptions"] == 0
    outputs = driver.answer([12, 22])
    assert (tokens_of(outputs), ends_of(outputs)) == ([(1, 1, 12), (2, 1, 22)], [("ends", 0, "length", -1, 2)])


def test_a_sequence_is_let_in_only_if_the_whole_of_its_text_fits_the_free_blocks() -> None:
    driver = Driver(num_blocks=[6], max_num_batched_tokens=4)
    driver.accept("a", 4, max_tokens=3)
    driver.accept("b", 23, max_tokens=1)
    driver.run([5])
    assert driver.run([6]).admitted == ()
    driver.run([7])
    assert prefills(driver.plan()[0]) == {0: 4}


def test_a_sequence_that_alone_fills_the_pool_ends_by_length() -> None:
    driver = Driver(num_blocks=[3])
    driver.accept("a", 8, max_tokens=50)
    outputs = []
    while driver.plan():
        outputs = driver.answer([5])
    # 12 KV entries, and the 13th token needs none.
    assert ends_of(outputs) == [("a", 0, "length", -1, 5)]


def test_the_context_ends_a_sequence_by_length() -> None:
    driver = Driver(max_model_len=10)
    driver.accept("a", 8, max_tokens=50)
    driver.run([5])
    driver.plan()
    assert ends_of(driver.answer([6])) == [("a", 0, "length", -1, 2)]


def test_a_row_whose_last_token_is_in_flight_is_evicted_and_not_computed_again() -> None:
    driver = Driver(async_scheduling=True)
    driver.accept("a", 4, max_tokens=1)
    driver.accept("b", 4, max_tokens=8)
    driver.plan()
    second = driver.plan()[0]
    assert (second.evicted.tolist(), second.num_tokens_across_dp.tolist()) == ([0], [1])
    assert ends_of(driver.answer([5, 6])) == [("a", 0, "length", -1, 1)]


def test_the_extra_token_of_a_row_that_has_ended_is_discarded_and_its_row_reused_after_it() -> None:
    driver = Driver(async_scheduling=True, max_num_seqs=1)
    driver.accept("a", 4, max_tokens=8)
    driver.accept("b", 4, max_tokens=8)
    driver.plan()
    driver.plan()
    assert ends_of(driver.answer([2])) == [("a", 0, "stop", 2, 1)]
    assert driver.plan() == []  # the only row is still computed by the step in flight
    assert driver.answer([9]) == []
    step = driver.plan()[0]
    assert (step.evicted.tolist(), [admit.row for admit in step.admitted]) == ([0], [0])


def test_all_continuations_of_a_request_are_rows_of_their_own() -> None:
    driver = Driver()
    accepted = driver.accept("a", 4, n=3, sampling=SamplingSpec(seed=9), seed_given=True)
    assert accepted.handles.tolist() == [1, 2, 3]
    step = driver.plan()[0]
    assert [(admit.row, admit.sampling.index, admit.sampling.seed) for admit in step.admitted] == [
        (0, 0, 9),
        (1, 1, 9),
        (2, 2, 9),
    ]
    assert tokens_of(driver.answer([5, 6, 7])) == [(1, 0, 5), (2, 0, 6), (3, 0, 7)]


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    driver = Driver()
    driver.accept("a", 8, max_tokens=1)
    driver.run([5])
    driver.accept("b", 8, max_tokens=1)
    (admit,) = (step := driver.plan()[0]).admitted
    # Both blocks of the prompt are cached; the last one is computed anew, since its logits are needed.
    assert (admit.num_cached, admit.blocks.tolist()[0], prefills(step)) == (4, 0, {0: 4})
    assert driver.core.counters()["prefix_hit_tokens"] == 4
    (end,) = driver.answer([5])[0].ends
    assert end.num_cached_tokens == 4


def test_a_block_is_cached_only_when_the_step_that_filled_it_is_acknowledged() -> None:
    driver = Driver(async_scheduling=True, max_num_batched_tokens=8, max_num_seqs=2)
    driver.accept("a", 8)
    driver.plan()
    driver.core.maintain(0.0)
    driver.accept("b", 9)
    assert driver.plan()[0].admitted[0].num_cached == 0
    driver.answer([5])
    driver.accept("c", [100, 101, 102, 103, 104])
    driver.answer([6])
    driver.cancel("a")
    driver.cancel("b")
    assert driver.plan()[0].admitted[0].num_cached == 4


@pytest.mark.parametrize("lockstep", [True, False])
def test_replicas_step_together_only_in_a_lockstep_group(lockstep: bool) -> None:
    driver = Driver(num_blocks=[8, 8], lockstep=lockstep)
    driver.accept("a", 4, data_parallel_rank=1)
    steps = driver.plan()
    if lockstep:
        assert [step.num_tokens_across_dp.tolist() for step in steps] == [[0, 4], [0, 4]]
        assert steps[0].step == steps[1].step == 0
        assert driver.core.counters()["dummy_steps"] == 1
    else:
        assert [step.num_tokens_across_dp.tolist() for step in steps] == [[4]]
        assert driver.core.counters()["dummy_steps"] == 0


def test_block_ids_on_the_wire_are_local_to_the_replica() -> None:
    driver = Driver(num_blocks=[8, 8])
    driver.accept("a", 6, data_parallel_rank=1)
    assert driver.plan()[1].admitted[0].blocks.tolist() == [0, 1]
    driver.answer([], [5])
    for _ in range(2):
        driver.plan()
        driver.answer([], [5])
    assert [appended(step) for step in driver.plan()] == [[], [(0, 2)]]


def test_step_arrays_are_int32() -> None:
    driver = Driver()
    driver.accept("a", 4)
    step = driver.run([5])
    grown = driver.run([6])
    arrays = [step.num_tokens_across_dp, step.evicted, step.prefill_rows, step.prefill_counts, step.admitted[0].blocks]
    assert {array.dtype for array in [*arrays, grown.append_rows, grown.append_blocks]} == {np.dtype(np.int32)}
