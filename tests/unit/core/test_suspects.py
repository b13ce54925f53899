"""Who is in the steps in flight, and requests that run apart from all others."""

from __future__ import annotations

import pytest

from drumline.protocol.messages import Step
from tests.unit.core.driver import Driver, ends_of, tokens_of


def test_suspects_are_the_requests_of_steps_that_some_replica_has_not_answered() -> None:
    driver = Driver(num_blocks=(16, 16), async_scheduling=True)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.accept("b", 40, data_parallel_rank=1)
    driver.accept("waits", 63, data_parallel_rank=1)
    first = driver.plan()
    assert set(driver.core.suspects(0)) == {"a", "b"}
    driver.core.apply(0, driver.done(0, first[0], [5]), 0.0)
    assert set(driver.core.suspects(0)) == {"a", "b"}
    driver.core.apply(1, driver.done(1, first[1], []), 0.0)
    assert driver.core.suspects(0) == ()
    assert driver.core.told_tokens(["a", "b", "unknown"]) == {"a": 1, "b": 0}


def test_requests_are_found_by_the_rows_of_the_worker() -> None:
    driver = Driver(num_blocks=(16, 16))
    driver.accept("a", 4, data_parallel_rank=1, n=2)
    driver.accept("b", 4, data_parallel_rank=1)
    driver.plan()
    assert driver.core.requests_in_rows(0, 1, [0, 1, 2, 3, 99]) == ("a", "b")
    assert driver.core.requests_in_rows(0, 0, [0]) == ()
    assert driver.core.requests_in_rows(0, 7, [0]) == ()


# -------------------------------------------------------------------------------------------------------- confinement


def running(driver: Driver) -> list[set[str]]:
    """Ids of the requests that are in rows, by replica."""
    table = driver.core._groups[0].table
    found: list[set[str]] = [set() for _ in range(table.replicas)]
    for row, one in enumerate(table.sequences):
        if one is not None and table.num_blocks[row]:
            found[row // table.rows_per_replica].add(one.request.request_id)
    return found


def step(driver: Driver) -> list[Step]:
    """One step, every row of which samples a 5."""
    steps = driver.plan()
    bounds = driver.core._groups[0].in_flight[0].bounds
    driver.answer(*([5] * (bounds[i + 1] - bounds[i]) for i in range(len(steps))))
    return steps


def two_replicas() -> Driver:
    driver = Driver(num_blocks=(32, 32), max_num_batched_tokens=64)
    for name in "abcd":
        driver.accept(name, 4, max_tokens=30)
    step(driver)
    return driver


def test_suspects_run_alone_on_their_replica_and_everybody_else_on_the_others() -> None:
    driver = two_replicas()
    assert running(driver) == [{"a", "c"}, {"b", "d"}]
    driver.core.confine(["a"], ["b"], 1)
    step(driver)
    assert running(driver) == [{"c", "d"}, {"a"}]
    driver.accept("new", 4)
    step(driver)
    assert running(driver) == [{"c", "d", "new"}, {"a"}]
    driver.core.confine([], [], None)
    step(driver)
    assert {"a", "b", "c", "d", "new"} == set().union(*running(driver))


def test_with_one_replica_everybody_but_the_suspects_waits() -> None:
    driver = Driver(num_blocks=(32,), max_num_batched_tokens=64)
    for name in "abc":
        driver.accept(name, 4, max_tokens=30)
    step(driver)
    driver.core.confine(["b"], ["c"], 0)
    driver.accept("new", 4)
    step(driver)
    assert running(driver) == [{"b"}]
    (status,) = driver.core.replica_status()
    assert (status.running, status.waiting) == (1, 3)
    driver.core.confine(["c"], [], 0)
    step(driver)
    assert running(driver) == [{"c"}]
    driver.core.confine([], [], None)
    step(driver)
    assert running(driver) == [{"a", "b", "c", "new"}]


def test_tokens_in_flight_of_who_must_leave_still_count() -> None:
    driver = Driver(async_scheduling=True, max_num_batched_tokens=32)
    driver.accept("a", 4)
    driver.accept("b", 4, max_tokens=2)
    driver.plan()
    driver.plan()
    driver.answer([5, 6])
    driver.core.confine(["a"], [], 0)
    outputs = driver.answer([7, 8])
    assert tokens_of(outputs) == [(1, 1, 7), (2, 1, 8)]
    assert ends_of(outputs) == [("b", 0, "length", -1, 2)]


def test_who_waits_apart_can_be_cancelled_and_counts_as_waiting() -> None:
    driver = Driver(max_waiting=2)
    driver.accept("a", 4)
    step(driver)
    driver.core.confine(["a"], [], 0)
    driver.accept("b", 4, n=2)
    assert driver.refuse("c", 4).error.kind == "queue_full"
    driver.cancel("b")
    (output,) = driver.core.outputs()
    assert output.cancelled == [(77, "b")]
    driver.accept("c", 4)
    driver.core.confine([], [], None)
    step(driver)
    assert running(driver) == [{"a", "c"}]


def test_a_confined_request_waits_for_its_replica_and_others_for_none() -> None:
    driver = two_replicas()
    driver.core.confine(["a"], [], 1)
    driver.core.close_epoch(0, [1], 0.0)
    driver.core.open_epoch(0, 2, [0], [0])
    driver.steps.clear()
    step(driver)
    assert running(driver) == [{"b", "c", "d"}, set()]
    driver.core.close_epoch(0, [], 0.0)
    driver.core.open_epoch(0, 3, [0, 1], [0])
    driver.steps.clear()
    step(driver)
    assert running(driver) == [{"b", "c", "d"}, {"a"}]


def test_suspects_move_to_another_lockstep_group_once_their_rows_are_free() -> None:
    driver = Driver(num_blocks=(16, 16), lockstep=False)
    driver.accept("a", 4, data_parallel_rank=0)
    driver.plan()
    driver.core.confine(["a"], [], 1)
    assert driver.core.plan(0.0) == []
    (output,) = driver.answer([5])
    assert tokens_of([output]) == [(1, 0, 5)]
    ((replica, planned),) = driver.core.plan(0.0)
    assert (replica, planned.admitted[0].tokens.tolist()) == (1, [100, 101, 102, 103, 5])
    assert [group.unfinished for group in driver.core._groups] == [0, 1]


def test_a_confinement_needs_both_requests_and_a_replica() -> None:
    driver = Driver()
    with pytest.raises(ValueError, match="confined"):
        driver.core.confine(["a"], [], None)
    with pytest.raises(ValueError, match="confined"):
        driver.core.confine([], [], 0)
