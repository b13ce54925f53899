"""Requests that outlive their connection, submissions that come twice, and what a journal is told."""

from __future__ import annotations

import pytest

from drumline.engine.core.readers import MAX_RETAINED
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Accepted, Rejected, Resume, Resumed
from tests.unit.core.driver import Driver, ends_of, tokens_of

WINDOW = 60.0


def resume(driver: Driver, request_id: str = "a", positions: tuple[int, ...] = (0,), connection: int = 2) -> Resumed:
    answer = driver.core.resume(connection, Resume(9, request_id, positions))
    assert isinstance(answer, Resumed), answer
    return answer


# ------------------------------------------------------------------------------------------------------------- durable


def test_a_durable_request_goes_on_without_its_connection_and_tells_connection_0() -> None:
    driver = Driver()
    driver.accept("a", 4, durable=True, client_params=b"mine")
    driver.run([5])
    driver.plan()
    driver.core.drop_connection(1, 10.0)
    (output,) = driver.answer([6])
    assert (output.connection, tokens_of([output])) == (0, [(1, 1, 6)])
    answer = resume(driver)
    assert [own.tolist() for own in answer.tokens] == [[5, 6]]
    assert (answer.client_params, answer.max_tokens, answer.handles.tolist()) == (b"mine", 8, [2])
    driver.plan()
    (output,) = driver.answer([7])
    assert (output.connection, tokens_of([output])) == (2, [(2, 2, 7)])


def test_what_was_collected_for_a_durable_request_before_its_connection_went_is_told_too() -> None:
    driver = Driver()
    driver.accept("a", 4, durable=True)
    driver.accept("b", 4)
    driver.plan()
    for replica, step in driver.steps.popleft():
        driver.core.apply(replica, driver.done(replica, step, [2, 6]), 0.0)
    driver.core.drop_connection(1, 0.0)
    (output,) = driver.core.outputs()
    assert (output.connection, tokens_of([output])) == (0, [(1, 0, 2)])
    assert [end[0] for end in ends_of([output])] == ["a"]


def test_a_request_that_nobody_comes_back_for_is_cancelled_when_its_window_ends() -> None:
    driver = Driver()
    driver.accept("live", 4, durable=True)
    driver.accept("ended", 4, durable=True, max_tokens=1)
    driver.run([5, 5])
    driver.core.drop_connection(1, 10.0)
    driver.core.tick(10.0 + WINDOW - 0.1)
    assert driver.refuse("live", 4).error.kind == "duplicate_request"
    assert driver.refuse("ended", 4).error.kind == "duplicate_request"
    driver.core.tick(10.0 + WINDOW)
    assert driver.core.idle
    assert driver.core.request_counts().cancelled == 1
    driver.accept("live", 4)
    driver.accept("ended", 4)


def test_one_that_was_resumed_in_time_stays() -> None:
    driver = Driver()
    driver.accept("a", 4, durable=True)
    driver.core.drop_connection(1, 10.0)
    resume(driver)
    driver.core.tick(1000.0)
    assert not driver.core.idle
    assert driver.core.connection_of("a") == 2
    assert driver.core.connection_of("unknown") == 0


def test_ended_requests_without_readers_are_kept_up_to_a_number() -> None:
    driver = Driver(max_waiting=MAX_RETAINED + 100)
    for i in range(MAX_RETAINED + 2):
        driver.accept(f"r{i}", 4, durable=True)
        driver.cancel(f"r{i}")
    driver.core.drop_connection(1, 0.0)
    driver.core.tick(0.0)
    gone = [i for i in range(MAX_RETAINED + 2) if f"r{i}" not in driver.core._book.register.by_id]
    assert gone == [0, 1]


# --------------------------------------------------------------------------------------------------------------- nonce


def test_the_same_submission_again_is_the_same_request_under_new_handles() -> None:
    driver = Driver()
    first = driver.accept("a", 4, nonce="n1", n=2)
    driver.run([5, 6])
    again = driver.accept("a", 4, nonce="n1", n=2, connection=2)
    assert (again.seed, again.handles.tolist()) == (first.seed, [3, 4])
    driver.plan()
    (output,) = driver.answer([7, 8])
    assert (output.connection, tokens_of([output])) == (2, [(3, 1, 7), (4, 1, 8)])
    assert driver.core.request_counts().accepted == 1


def test_the_same_submission_of_a_request_that_has_ended_is_told_its_end_again() -> None:
    driver = Driver()
    driver.accept("a", 4, nonce="n1", max_tokens=1)
    driver.run([5])
    again = driver.submit("a", 4, nonce="n1", max_tokens=1, connection=2)
    assert isinstance(again, Accepted)
    (output,) = driver.core.outputs()
    assert (output.connection, [end.handle for end in output.ends]) == (2, again.handles.tolist())


@pytest.mark.parametrize(("before", "after"), [("n1", "n2"), ("n1", ""), ("", "")])
def test_another_submission_of_a_live_id_is_refused(before: str, after: str) -> None:
    driver = Driver()
    driver.accept("a", 4, nonce=before)
    assert driver.refuse("a", 4, nonce=after).error.kind == "duplicate_request"


# -------------------------------------------------------------------------------------------------------------- failed


ERROR = ErrorInfo(kind="poisoned", text="it kills")


def test_one_request_fails_and_its_client_is_told_while_others_go_on() -> None:
    driver = Driver()
    driver.accept("a", 4, n=2)
    driver.accept("b", 4)
    driver.run([5, 6, 7])
    driver.plan()
    driver.core.fail("a", ERROR)
    driver.core.fail("unknown", ERROR)
    outputs = driver.answer([8, 9, 10])
    assert [output.failed for output in outputs] == [[("a", ERROR)]]
    assert tokens_of(outputs) == [(3, 1, 10)]
    assert ends_of(outputs) == []
    assert driver.core.request_counts().failed == 1
    driver.accept("a", 4)


def test_a_request_that_has_ended_does_not_fail() -> None:
    driver = Driver()
    driver.accept("a", 4, max_tokens=1)
    driver.run([5])
    driver.core.fail("a", ERROR)
    assert driver.core.outputs() == []
    assert driver.core.request_counts().failed == 0


def test_one_that_nobody_reads_says_that_it_failed_to_who_comes_back() -> None:
    driver = Driver()
    driver.accept("a", 4, durable=True, nonce="n1")
    driver.core.drop_connection(1, 0.0)
    driver.core.fail("a", ERROR)
    answer = driver.core.resume(2, Resume(9, "a", (0,)))
    assert isinstance(answer, Rejected)
    assert answer.error == ERROR
    assert driver.refuse("a", 4, nonce="n1").error == ERROR
    driver.core.tick(WINDOW)
    driver.accept("a", 4)


# --------------------------------------------------------------------------------------------------------------- notes


def test_notes_tell_what_is_accepted_moved_and_forgotten_once() -> None:
    driver = Driver()
    driver.accept("a", 4, n=2, max_tokens=1)
    notes = driver.core.take_notes()
    assert notes is not None
    ((submit, handle),) = notes.accepted
    assert (submit.request_id, submit.seed_given, submit.n, handle) == ("a", True, 2, 1)
    assert submit.sampling.stop_token_ids == ()
    assert driver.core.take_notes() is None
    resume(driver, positions=(0, 0))
    driver.run([5, 6])
    driver.core.forget("a")
    notes = driver.core.take_notes()
    assert notes is not None
    assert (notes.accepted, notes.rehandled, notes.forgotten) == ((), (), ("a",))


def test_a_move_alone_is_noted_with_its_first_handle() -> None:
    driver = Driver()
    driver.accept("a", 4, n=2)
    driver.core.take_notes()
    resume(driver, positions=(0, 0))
    notes = driver.core.take_notes()
    assert notes is not None
    assert notes.rehandled == (("a", 3),)


def test_of_what_is_accepted_and_forgotten_between_two_notes_only_the_latter_is_told() -> None:
    driver = Driver()
    driver.accept("a", 4)
    driver.core.drop_connection(1, 0.0)
    notes = driver.core.take_notes()
    assert notes is not None
    assert (notes.accepted, notes.forgotten) == ((), ("a",))
    driver.accept("a", 4)
    driver.core.drop_connection(1, 0.0)
    driver.accept("a", 4)
    notes = driver.core.take_notes()
    assert notes is not None
    assert ([handle for _, handle in notes.accepted], notes.forgotten) == ([3], ("a",))


def test_a_resume_that_names_no_positions_is_told_everything() -> None:
    driver = Driver()
    driver.accept("a", 4, n=2)
    driver.run([5, 6])
    answer = resume(driver, positions=())
    assert [own.tolist() for own in answer.tokens] == [[5], [6]]
