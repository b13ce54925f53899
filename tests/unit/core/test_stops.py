"""How sequences end: stop ids, lengths, stop strings, cancels."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.protocol.messages import LogprobEntry, SamplingSpec, StepDone, Stop
from tests.unit.core.driver import Driver, ends_of, tokens_of


def stops(*ids: int, min_tokens: int = 0) -> SamplingSpec:
    return SamplingSpec(stop_token_ids=ids, min_tokens=min_tokens)


def test_eos_ends_a_sequence_and_is_its_last_token() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.run([5])
    driver.plan()
    outputs = driver.answer([2])
    assert tokens_of(outputs) == [(1, 1, 2)]
    assert ends_of(outputs) == [("a", 0, "stop", 2, 2)]


def test_ignore_eos_goes_on_past_eos_but_not_past_the_users_stop_ids() -> None:
    driver = Driver()
    driver.accept("a", 4, ignore_eos=True, sampling=stops(7))
    driver.run([2])
    driver.plan()
    assert ends_of(driver.answer([7])) == [("a", 0, "stop", 7, 2)]


def test_workers_are_told_eos_among_the_stop_ids_unless_it_is_ignored() -> None:
    driver = Driver()
    driver.accept("a", 4, sampling=stops(7))
    driver.accept("b", 4, sampling=stops(7), ignore_eos=True)
    admits = driver.plan()[0].admitted
    assert [admit.sampling.stop_token_ids for admit in admits] == [(7, 2), (7,)]


def test_before_min_tokens_a_stop_id_is_a_token_like_any_other() -> None:
    driver = Driver()
    driver.accept("a", 4, sampling=stops(7, min_tokens=2))
    for token in (7, 2):
        driver.run([token])
    driver.plan()
    assert ends_of(driver.answer([7])) == [("a", 0, "stop", 7, 3)]


def test_a_stop_id_of_one_row_is_none_of_another() -> None:
    driver = Driver()
    driver.accept("a", 4, sampling=stops(7))
    driver.accept("b", 4, sampling=stops(8))
    driver.plan()
    assert ends_of(driver.answer([8, 8])) == [("b", 0, "stop", 8, 1)]


@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_any_number_of_stop_ids_ends_a_sequence_and_is_forgotten_with_its_row(count: int) -> None:
    driver = Driver(max_num_seqs=2)
    ids = range(10, 10 + count)
    driver.accept("many", 4, sampling=stops(*ids))
    driver.accept("few", 4, sampling=stops(999))
    driver.run([5, 10 + count - 1])
    driver.plan()
    assert ends_of(driver.answer([10 + count - 1, 5])) == [("many", 0, "stop", 10 + count - 1, 2)]
    driver.accept("next", 4, ignore_eos=True)
    driver.plan()
    assert ends_of(driver.answer([10 + count - 1, 6])) == []


def test_a_stop_token_that_is_also_the_last_by_length_counts_as_a_stop() -> None:
    driver = Driver()
    driver.accept("a", 4, max_tokens=2)
    driver.run([5])
    driver.plan()
    assert ends_of(driver.answer([2])) == [("a", 0, "stop", 2, 2)]


def test_a_stop_string_truncates_where_the_client_says() -> None:
    driver = Driver()
    driver.accept("a", 4)
    for token in (5, 6, 7):
        driver.run([token])
    driver.core.stop(1, Stop("a", 0, 2))
    assert ends_of(driver.core.outputs()) == [("a", 0, "stop", -1, 2)]
    assert driver.plan() == []
    assert driver.core.idle


def test_a_stop_that_comes_after_the_end_changes_nothing() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.plan()
    assert ends_of(driver.answer([2])) == [("a", 0, "stop", 2, 1)]
    driver.core.stop(1, Stop("a", 0, 1))
    assert driver.core.outputs() == []


@pytest.mark.parametrize(
    ("connection", "msg"),
    [(1, Stop("a", 0, 3)), (1, Stop("a", 0, 0)), (1, Stop("a", 1, 1)), (1, Stop("b", 0, 1)), (2, Stop("a", 0, 1))],
)
def test_a_stop_that_names_nothing_this_client_was_given_is_ignored_and_counted(connection: int, msg: Stop) -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.run([5])
    driver.run([6])
    driver.core.stop(connection, msg)
    assert driver.core.outputs() == []
    assert driver.core.counters()["ignored_stops"] == 1


def test_a_cancel_is_confirmed_when_the_row_is_free_and_its_blocks_are_back() -> None:
    driver = Driver(async_scheduling=True, num_blocks=[8])
    driver.accept("a", 8)
    driver.plan()
    driver.plan()
    driver.cancel("a")
    (output,) = driver.core.outputs()
    assert (ends_of([output]), output.cancelled) == ([("a", 0, "abort", -1, 0)], [])
    assert driver.answer([5]) == []
    (output,) = driver.answer([6])
    assert output.cancelled == [(77, "a")]
    assert driver.core.replica_status()[0].blocks_free == 8


def test_a_cancel_without_a_step_in_flight_is_confirmed_at_once() -> None:
    driver = Driver()
    driver.accept("a", 8)
    driver.cancel("a")
    (output,) = driver.core.outputs()
    assert (ends_of([output]), output.cancelled) == ([("a", 0, "abort", -1, 0)], [(77, "a")])
    assert driver.plan() == []


@pytest.mark.parametrize("request_id", ["ended", "never heard of"])
def test_a_cancel_of_what_does_not_run_is_confirmed_at_once(request_id: str) -> None:
    driver = Driver()
    driver.accept("ended", 4, max_tokens=1)
    driver.run([5])
    driver.cancel(request_id)
    (output,) = driver.core.outputs()
    assert (output.ends, output.cancelled) == ([], [(77, request_id)])


def test_a_cancel_ends_every_continuation_that_has_not_ended() -> None:
    driver = Driver()
    driver.accept("a", 4, n=3)
    driver.plan()
    driver.answer([5, 2, 6])
    driver.cancel("a")
    outputs = driver.core.outputs()
    assert ends_of(outputs) == [("a", 0, "abort", -1, 1), ("a", 2, "abort", -1, 1)]
    assert driver.core.request_counts().cancelled == 1


def test_an_end_acknowledged_before_the_cancel_is_confirmed_frees_the_id_and_the_confirmation_still_comes() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.plan()
    driver.cancel("a")
    assert ends_of(driver.core.outputs()) == [("a", 0, "abort", -1, 0)]
    driver.core.forget("a")
    driver.accept("a", 4)
    (output,) = driver.answer([5])
    assert output.cancelled == [(77, "a")]
    driver.core.forget("a")  # the new one runs: it stays
    assert driver.refuse("a", 4).error.kind == "duplicate_request"


def test_what_is_in_flight_for_a_cancelled_request_is_discarded() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.accept("b", 4)
    driver.plan()
    driver.cancel("a")
    assert tokens_of(driver.answer([5, 6])) == [(2, 0, 6)]


def test_logprobs_stay_with_their_tokens_when_others_are_discarded() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.accept("b", 4, sampling=SamplingSpec(logprobs=0))
    driver.plan()
    driver.cancel("a")
    none = np.zeros(0, dtype=np.int32)
    entry = LogprobEntry(6, -0.25, 1, none, np.zeros(0, dtype=np.float32))
    tokens, places = np.asarray([5, 6], dtype=np.int32), np.asarray([1], dtype=np.int32)
    driver.core.apply(0, StepDone(1, 1, 0, 0, tokens, places, (entry,)), 0.0)
    (output,) = driver.core.outputs()
    assert (output.tokens.tolist(), output.logprob_index.tolist(), output.logprobs) == ([6], [0], (entry,))
