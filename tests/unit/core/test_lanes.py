"""Rows in lanes: who takes turns, who is passed over, and what several tokens of one row in flight come to."""

from __future__ import annotations

import itertools

import pytest

from drumline.engine.core.lanes import share_of_lane
from drumline.protocol.messages import Resume, Resumed, Step
from tests.unit.core.driver import Driver, appended, ends_of, prefills, tokens_of


def lanes_of(driver: Driver, count: int, *tokens: list[int]) -> list[int]:
    """The lanes of the next ``count`` steps, each answered with ``tokens`` before the next."""
    return [driver.run(*tokens).lane for _ in range(count)]


def one_lane(**settings: object) -> Driver:
    """Three steps of one row in flight: its prompt and two more tokens. The other lane is empty."""
    driver = Driver(pipeline_parallel_size=2, async_scheduling=True, **settings)  # type: ignore[arg-type]
    driver.accept("a", 4, max_tokens=20)
    assert [driver.plan()[0].lane for _ in range(3)] == [0, 0, 0]
    assert driver.plan() == []
    return driver


@pytest.mark.parametrize(("stages", "ahead", "steps"), [(1, False, 1), (1, True, 2), (3, False, 3), (3, True, 4)])
def test_a_step_for_each_stage_is_in_flight_and_one_more_when_scheduling_ahead(
    stages: int, ahead: bool, steps: int
) -> None:
    driver = Driver(pipeline_parallel_size=stages, async_scheduling=ahead)
    driver.accept("a", 4, max_tokens=20)
    planned = [driver.plan() for _ in range(6)]
    assert [len(own) for own in planned] == [1] * steps + [0] * (6 - steps)


def test_lanes_take_turns_and_a_row_computes_only_in_the_steps_of_its_lane() -> None:
    driver = Driver(pipeline_parallel_size=2)
    driver.accept("a", 4)
    driver.accept("b", 5)
    first, second = driver.plan()[0], driver.plan()[0]
    assert (first.lane, prefills(first), [admit.lane for admit in first.admitted]) == (0, {0: 4}, [0])
    assert (second.lane, prefills(second), [admit.lane for admit in second.admitted]) == (1, {1: 5}, [1])
    assert tokens_of(driver.answer([5])) == [(1, 0, 5)]
    third = driver.plan()[0]
    assert (third.lane, third.num_tokens_across_dp.tolist()) == (0, [1])
    assert tokens_of(driver.answer([6])) == [(2, 0, 6)]
    assert tokens_of(driver.answer([7])) == [(1, 1, 7)]


def test_a_lane_without_rows_is_passed_over_until_it_has_some() -> None:
    driver = Driver(pipeline_parallel_size=3)
    driver.accept("a", 4)
    assert lanes_of(driver, 3, [5]) == [0, 0, 0]
    driver.accept("b", 4)
    assert lanes_of(driver, 5, [5]) == [1, 0, 1, 0, 1]
    driver.cancel("a")
    assert lanes_of(driver, 2, [5]) == [1, 1]


def test_a_lane_that_has_rows_on_one_replica_gets_its_step_on_all() -> None:
    driver = Driver(num_blocks=[8, 8], pipeline_parallel_size=2)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.accept("b", 4, data_parallel_rank=1)
    driver.accept("c", 4, data_parallel_rank=1)
    planned = [driver.plan() for _ in range(2)]
    assert [[step.lane for step in steps] for steps in planned] == [[0, 0], [1, 1]]
    assert [steps[0].num_tokens_across_dp.tolist() for steps in planned] == [[4, 4], [0, 4]]
    driver.answer([5], [5])
    driver.answer([], [5])
    assert driver.plan()[0].num_tokens_across_dp.tolist() == [1, 1]
    assert driver.plan()[0].num_tokens_across_dp.tolist() == [0, 1]
    assert driver.core.counters()["dummy_steps"] == 2


def test_a_prompt_in_chunks_is_computed_in_its_lane_alone() -> None:
    driver = Driver(pipeline_parallel_size=2, max_num_batched_tokens=8, enable_prefix_caching=False)
    driver.accept("a", 4)
    driver.run([5])
    driver.accept("b", 20)
    counts = []
    for tokens in ([], [5], [], [5], [6]):
        step = driver.run(tokens)
        counts.append((step.lane, prefills(step)))
    assert counts == [(1, {1: 8}), (0, {}), (1, {1: 8}), (0, {}), (1, {1: 4})]


# ---------------------------------------------------------------------------------------------------------- admission


def admitted(step: Step) -> int:
    return len(step.admitted)


def test_a_burst_is_shared_out_over_the_lanes_in_as_many_steps_as_there_are_lanes() -> None:
    driver = Driver(num_blocks=[64], pipeline_parallel_size=2, max_num_seqs=8)
    for number in range(7):
        driver.accept(f"r{number}", 2)
    assert (admitted(driver.run([5] * 4)), admitted(driver.run([5] * 3))) == (4, 3)


def test_no_more_rows_run_than_max_num_seqs_over_all_lanes() -> None:
    driver = Driver(num_blocks=[64], pipeline_parallel_size=2, max_num_seqs=3)
    for number in range(7):
        driver.accept(f"r{number}", 2)
    assert (admitted(driver.run([5] * 2)), admitted(driver.run([5]))) == (2, 1)
    assert (admitted(driver.run([5] * 2)), admitted(driver.run([5]))) == (0, 0)


def test_what_comes_waits_for_the_turn_of_the_lane_with_fewest_rows() -> None:
    driver = Driver(num_blocks=[64], pipeline_parallel_size=2)
    for name in ("a", "b", "c"):
        driver.accept(name, 2)
    driver.run([5, 5])
    driver.run([5])
    driver.accept("d", 2)
    step = driver.run([5, 5])
    assert (step.lane, admitted(step)) == (0, 0)
    step = driver.run([5, 5])
    assert (step.lane, [(admit.row, admit.lane) for admit in step.admitted]) == (1, [(3, 1)])


def test_blocks_for_one_more_sequence_go_to_the_lane_with_fewest_rows() -> None:
    driver = Driver(num_blocks=[5], pipeline_parallel_size=2, enable_prefix_caching=False)
    for name in ("a", "b", "c", "d", "e"):
        driver.accept(name, 6)
    # Two blocks each: two sequences fit. The three that wait do not draw a lane beyond its share.
    assert (admitted(driver.run([5])), admitted(driver.run([5]))) == (1, 1)


def literal_share(rows: list[int], lane: int, coming: int) -> int:
    """One by one to the lane with fewest rows, ties to ``lane``."""
    counts = list(rows)
    for _ in range(coming):
        least = min(counts)
        counts[lane if counts[lane] == least else counts.index(least)] += 1
    return counts[lane] - rows[lane]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_a_lanes_share_is_what_it_gets_when_all_come_one_by_one(lanes: int) -> None:
    for rows in itertools.product(range(4), repeat=lanes):
        for lane, coming in itertools.product(range(lanes), range(9)):
            assert share_of_lane(rows, lane, coming) == literal_share(list(rows), lane, coming), (rows, lane, coming)


# -------------------------------------------------------------------------------- several tokens of a row in flight


def test_a_row_alone_has_a_token_in_every_step_in_flight_each_in_a_block_of_its_own() -> None:
    driver = Driver(num_blocks=[12], block_size=1, pipeline_parallel_size=2, async_scheduling=True)
    driver.accept("a", 3, max_tokens=7)
    steps = [driver.plan()[0] for _ in range(3)]
    assert [appended(step) for step in steps] == [[], [(0, 3)], [(0, 4)]]
    told = []
    for token in range(11, 18):
        told += tokens_of(driver.answer([token]))
        driver.plan()
    assert told == [(1, position, 11 + position) for position in range(7)]
    answer = driver.core.resume(1, Resume(9, "a", (0,)))
    assert isinstance(answer, Resumed)
    assert answer.tokens[0].tolist() == list(range(11, 18))
    # What was computed is found again by whoever goes on from there, up to the last token of all.
    driver.accept("b", [100, 101, 102, *range(11, 18)])
    assert driver.plan()[0].admitted[0].num_cached == 9


def test_a_stop_that_is_found_while_two_more_steps_are_in_flight_discards_their_tokens() -> None:
    driver = one_lane()
    assert ends_of(driver.answer([2])) == [("a", 0, "stop", 2, 1)]
    driver.accept("b", 4)
    step = driver.plan()[0]
    # The row is still computed by two steps in flight, so the next sequence takes another.
    assert (step.lane, step.evicted.tolist(), [admit.row for admit in step.admitted]) == (1, [0], [1])
    assert [driver.answer([token]) for token in (8, 9)] == [[], []]
    assert tokens_of(driver.answer([7])) == [(2, 0, 7)]
    assert driver.core.replica_status()[0].running == 1


def test_the_eviction_of_a_row_is_said_in_the_next_step_of_any_lane() -> None:
    driver = Driver(pipeline_parallel_size=2)
    driver.accept("ends", 4, max_tokens=1)
    driver.accept("goes on", 4)
    first, second = driver.plan()[0], driver.plan()[0]
    assert (first.lane, second.lane, second.evicted.tolist()) == (0, 1, [0])


def two_lanes_short_of_blocks() -> Driver:
    """Rows 0 and 1 of lanes 0 and 1 hold two blocks each of four, and compute their eighth token, which fills them."""
    driver = Driver(num_blocks=[4], pipeline_parallel_size=2, async_scheduling=True, enable_prefix_caching=False)
    driver.accept("a", 7, max_tokens=20)
    driver.accept("b", 7, max_tokens=20)
    assert [driver.plan()[0].lane for _ in range(3)] == [0, 1, 0]
    driver.answer([11])
    assert driver.plan()[0].lane == 1
    driver.answer([21])
    return driver


def test_a_row_of_another_lane_gives_way_and_its_token_in_flight_counts() -> None:
    driver = two_lanes_short_of_blocks()
    step = driver.plan()[0]
    assert (step.lane, step.evicted.tolist(), step.num_tokens_across_dp.tolist()) == (0, [1], [1])
    assert appended(step) == [(0, 2)]
    assert driver.core.counters()["preemptions"] == 1
    assert tokens_of(driver.answer([12])) == [(1, 1, 12)]
    assert tokens_of(driver.answer([22])) == [(2, 1, 22)]
    driver.cancel("a")
    (admit,) = driver.plan()[0].admitted
    assert admit.tokens.tolist() == [*range(100, 107), 21, 22]


def test_a_row_that_is_preempted_with_three_tokens_in_flight_goes_on_after_the_last_of_them() -> None:
    driver = Driver(num_blocks=[6], pipeline_parallel_size=3, async_scheduling=True, enable_prefix_caching=False)
    for name, length in (("a", 4), ("b", 4), ("c", 2), ("d", 2)):
        driver.accept(name, length, max_tokens=30)
    assert [admitted(driver.plan()[0]) for _ in range(3)] == [2, 1, 1]
    driver.cancel("c")
    driver.cancel("d")
    for tokens in ([11, 21], [8], [9]):
        driver.answer(tokens)
    # Lane 0 has two rows, the others none: the rows grow to three blocks each, all that there are.
    assert lanes_of(driver, 5, [12, 22]) == [0] * 5
    assert [driver.plan()[0].num_tokens_across_dp.tolist() for _ in range(3)] == [[2]] * 3
    step = driver.plan()[0]
    assert (step.evicted.tolist(), step.num_tokens_across_dp.tolist()) == ([1], [1])
    told = [tokens_of(driver.answer(tokens)) for tokens in ([13, 23], [14, 24], [15, 25], [16])]
    assert [entry for own in told for entry in own if entry[0] == 2] == [(2, 6, 23), (2, 7, 24), (2, 8, 25)]
    driver.cancel("a")
    (admit,) = driver.plan()[0].admitted
    assert admit.tokens.tolist() == [*range(100, 104), 21, 22, 22, 22, 22, 22, 23, 24, 25]
