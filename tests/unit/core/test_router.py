"""Which replica serves a request."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.router import Router
from tests.unit.core.driver import Driver


def choose(
    router: Router,
    waiting: list[int],
    running: list[int],
    unacknowledged: list[int] | None = None,
    fits: list[bool] | None = None,
    cached: list[int] | None = None,
) -> int:
    count = len(waiting)
    return router.choose(
        np.asarray(waiting),
        np.asarray(running),
        np.asarray(unacknowledged or [0] * count),
        np.asarray(fits or [True] * count),
        cached,
    ).replica


def test_ties_rotate_so_that_a_burst_onto_idle_replicas_spreads_evenly() -> None:
    router = Router(3)
    assert [choose(router, [0, 0, 0], [0, 0, 0]) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_least_loaded_replica_is_taken() -> None:
    assert choose(Router(3), [0, 0, 0], [5, 3, 4]) == 1


def test_one_that_waits_weighs_as_much_as_four_that_run() -> None:
    assert choose(Router(2), [1, 0], [0, 3]) == 1
    assert choose(Router(2), [1, 0], [0, 5]) == 0


def test_what_was_sent_and_not_yet_answered_counts() -> None:
    assert choose(Router(2), [0, 0], [2, 3], [2, 0]) == 1


def test_a_replica_too_small_for_the_request_is_left_out() -> None:
    assert choose(Router(2), [0, 9], [0, 9], fits=[False, True]) == 1
    with pytest.raises(LookupError, match="no replica fits"):
        choose(Router(2), [0, 0], [0, 0], fits=[False, False])


def test_the_replica_that_holds_the_prompt_is_taken_while_it_is_not_much_busier() -> None:
    assert choose(Router(2), [0, 0], [0, 4], cached=[0, 32]) == 1
    assert choose(Router(2), [0, 0], [0, 5], cached=[0, 32]) == 0
    assert choose(Router(2), [0, 0], [1, 0], cached=[0, 0]) == 1


def test_a_burst_in_one_instant_is_spread_over_the_replicas() -> None:
    driver = Driver(num_blocks=[16, 16, 16, 16])
    for number in range(8):
        driver.accept(f"r{number}", 4)
    assert [replica.waiting for replica in driver.core.replica_status()] == [2, 2, 2, 2]


def test_requests_go_to_the_replica_they_are_pinned_to() -> None:
    driver = Driver(num_blocks=[16, 16], lockstep=False)
    for number in range(3):
        driver.accept(f"r{number}", 4, data_parallel_rank=1)
    assert [replica.waiting for replica in driver.core.replica_status()] == [0, 3]


def test_with_affinity_a_conversation_goes_back_to_where_its_prefix_is() -> None:
    driver = Driver(num_blocks=[16, 16], prefix_affinity=True)
    driver.accept("first", 9, max_tokens=1, data_parallel_rank=1)
    driver.plan()
    driver.answer([], [5])
    driver.accept("second", 9, max_tokens=1)
    assert [replica.waiting for replica in driver.core.replica_status()] == [0, 1]
