"""Requests of an earlier coordinator: restored from its journal, snapshotted for one, adopted from clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drumline.engine.core.restored import RestoredRequest
from drumline.protocol.messages import LogprobEntry, Rejected, Resume, Resumed, SamplingSpec, StreamEnd, Submit
from tests.unit.core.driver import Driver, ends_of, tokens_of

NO_I32 = np.zeros(0, dtype=np.int32)


def ids(*tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(tokens, dtype=np.int32)


def submission(request_id: str = "a", n: int = 1, max_tokens: int = 8, **more: Any) -> Submit:
    sampling = more.pop("sampling", SamplingSpec(seed=77))
    return Submit(1, request_id, ids(100, 101, 102, 103), sampling, max_tokens, n, seed_given=True, **more)


def entry(token: int) -> LogprobEntry:
    return LogprobEntry(token, -0.5, 1, NO_I32, np.zeros(0, dtype=np.float32))


# ------------------------------------------------------------------------------------------------------------- restore


def test_a_restored_request_goes_on_from_its_next_token_under_its_handles() -> None:
    driver = Driver(epoch=False)
    one = RestoredRequest(
        submission(n=2, sampling=SamplingSpec(seed=77, logprobs=0)),
        first_handle=40,
        tokens=(ids(5, 6), ids(7, 2)),
        logprobs=((entry(5), entry(6)), (entry(7), entry(2))),
        ends=(None, StreamEnd(41, "a", 1, "stop", 2, 2, 0)),
    )
    driver.core.restore([one], 0.0)
    driver.core.open_epoch(0, 1)
    step = driver.plan()[0]
    (admit,) = step.admitted
    assert (admit.tokens.tolist(), admit.prompt_len, admit.sampling.seed) == ([100, 101, 102, 103, 5, 6], 4, 77)
    (output,) = driver.answer([9])
    assert (output.connection, tokens_of([output])) == (0, [(40, 2, 9)])
    answer = driver.core.resume(1, Resume(9, "a", (2, 2)))
    assert isinstance(answer, Resumed)
    assert [own.tolist() for own in answer.tokens] == [[5, 6, 9], [7, 2]]
    assert [one.token for one in answer.logprobs[1]] == [7, 2]
    assert [(end.index, end.reason) for end in answer.ends] == [(1, "stop")]
    assert answer.handles.tolist() == [42, 43]


def test_handles_go_on_behind_the_highest_restored() -> None:
    driver = Driver(epoch=False)
    driver.core.restore([RestoredRequest(submission(), 9, (NO_I32,), ((),), (None,))], 0.0)
    assert driver.accept("b", 4).handles.tolist() == [10]


def test_restored_requests_keep_their_order_and_priorities() -> None:
    driver = Driver(epoch=False, max_num_seqs=1)
    for number, (name, priority) in enumerate((("late", 5), ("first", 0), ("second", 0))):
        one = RestoredRequest(submission(name, priority=priority), number + 1, (NO_I32,), ((),), (None,))
        driver.core.restore([one], 0.0)
    driver.core.open_epoch(0, 1)
    order: list[str] = []
    while planned := driver.plan():
        order += [driver.core.requests_in_rows(0, 0, [admit.row])[0] for admit in planned[0].admitted]
        driver.answer([2])
    assert order == ["first", "second", "late"]


def test_a_restored_request_that_nobody_resumes_ends_with_its_window() -> None:
    driver = Driver(epoch=False)
    driver.core.restore([RestoredRequest(submission(), 1, (NO_I32,), ((),), (None,))], 100.0)
    driver.core.tick(159.0)
    assert not driver.core.idle
    driver.core.tick(160.0)
    assert driver.core.idle


@pytest.mark.parametrize(("tokens", "reason"), [((5, 2), "stop"), ((5, 5, 5), "length")])
def test_a_restored_request_whose_tokens_end_it_has_ended(tokens: tuple[int, ...], reason: str) -> None:
    driver = Driver()
    one = RestoredRequest(submission(max_tokens=3), 1, (ids(*tokens),), ((),), (None,))
    driver.core.restore([one], 0.0)
    assert driver.plan() == []
    assert [(end[2], end[4]) for end in ends_of(driver.core.outputs())] == [(reason, len(tokens))]


# ------------------------------------------------------------------------------------------------------------ snapshot


def test_a_snapshot_is_what_outputs_and_notes_have_told_and_restores_to_the_same_requests() -> None:
    driver = Driver()
    driver.accept("a", 4, n=2, sampling=SamplingSpec(logprobs=0), durable=True)
    driver.accept("ended", 4, max_tokens=1)
    driver.core.take_notes()
    driver.run([5, 6, 7])
    driver.accept("untold", 4)
    driver.plan()
    for replica, step in driver.steps.popleft():
        driver.core.apply(replica, driver.done(replica, step, [8, 2, 4]), 0.0)
    first, second = driver.core.snapshot()
    assert [own.tolist() for own in first.tokens] == [[5], [6]]
    assert (first.first_handle, first.ends, second.ends[0] is not None) == (1, (None, None), True)
    assert first.submit.seed_given
    driver.core.outputs()
    driver.core.take_notes()
    snapshot = driver.core.snapshot()
    assert [one.submit.request_id for one in snapshot] == ["a", "ended", "untold"]
    assert [own.tolist() for own in snapshot[0].tokens] == [[5, 8], [6, 2]]
    assert [end is not None for end in snapshot[0].ends] == [False, True]
    again = Driver(epoch=False)
    again.core.restore(snapshot, 0.0)
    assert [one.tokens[0].tolist() for one in again.core.snapshot()] == [[5, 8], [7], [4]]


# --------------------------------------------------------------------------------------------------------------- adopt


def adopt(driver: Driver, *tokens: tuple[int, ...], connection: int = 1, **more: Any) -> Resumed | Rejected:
    positions = tuple(len(own) for own in tokens)
    submit = submission(n=len(tokens), **more)
    resume = Resume(9, "a", positions, tuple(ids(*own) for own in tokens), submit)
    return driver.core.adopt(connection, resume, 0.0)


def test_a_request_that_is_not_known_is_made_of_what_its_client_has() -> None:
    driver = Driver()
    answer = adopt(driver, (5, 6), (7, 2))
    assert isinstance(answer, Resumed)
    assert (answer.seed, [own.tolist() for own in answer.tokens]) == (77, [[5, 6], [7, 2]])
    assert [(end.index, end.reason, end.stop_token) for end in answer.ends] == [(1, "stop", 2)]
    notes = driver.core.take_notes()
    assert notes is not None
    assert [handle for _, handle in notes.accepted] == [1]
    journal, client = driver.core.outputs()
    assert (journal.connection, tokens_of([journal])) == (0, [(1, 0, 5), (1, 1, 6), (2, 0, 7), (2, 1, 2)])
    assert (client.connection, [end[1] for end in ends_of([client])]) == (1, [1])
    (admit,) = driver.plan()[0].admitted
    assert (admit.tokens.tolist(), admit.prompt_len) == ([100, 101, 102, 103, 5, 6], 4)
    assert tokens_of(driver.answer([9])) == [(1, 2, 9)]


def test_tokens_that_only_the_client_has_are_taken_from_it_and_what_is_in_flight_is_discarded() -> None:
    driver = Driver(async_scheduling=True)
    driver.core.submit(1, submission(), 0.0)
    driver.plan()
    driver.plan()
    driver.answer([5])
    answer = adopt(driver, (5, 6, 7), connection=2)
    assert isinstance(answer, Resumed)
    assert answer.tokens[0].tolist() == [5, 6, 7]
    assert tokens_of(driver.answer([6])) == [(1, 1, 6), (1, 2, 7)]  # the client's, for the journal
    step = driver.plan()[0]
    assert step.admitted[0].tokens.tolist() == [100, 101, 102, 103, 5, 6, 7]
    (output,) = driver.answer([8])
    assert (output.connection, tokens_of([output])) == (2, [(2, 3, 8)])


def test_a_client_that_has_less_is_told_the_rest() -> None:
    driver = Driver()
    driver.core.submit(1, submission(), 0.0)
    driver.run([5])
    driver.run([6])
    answer = adopt(driver, (5,))
    assert isinstance(answer, Resumed)
    assert answer.tokens[0].tolist() == [5, 6]


def test_a_client_with_other_tokens_is_told_that_the_request_diverged_and_it_fails() -> None:
    driver = Driver()
    driver.core.submit(3, submission(), 0.0)
    driver.run([5])
    answer = adopt(driver, (6,))
    assert isinstance(answer, Rejected)
    assert (answer.error.kind, "token 0 is 5, the client has 6" in answer.error.text) == ("diverged", True)
    (output,) = driver.core.outputs()
    assert (output.connection, output.failed) == (3, [("a", answer.error)])
    assert driver.core.idle


def test_tokens_behind_a_natural_end_diverge() -> None:
    driver = Driver()
    answer = adopt(driver, (2, 5))
    assert isinstance(answer, Rejected)
    assert answer.error.kind == "diverged"
    assert driver.core.idle


def test_a_client_that_read_on_behind_its_own_stop_may_resume() -> None:
    driver = Driver()
    driver.core.submit(1, submission(), 0.0)
    driver.run([5])
    driver.run([6])
    driver.cancel("a")
    answer = adopt(driver, (5, 6, 7))
    assert isinstance(answer, Resumed)
    assert answer.tokens[0].tolist() == [5, 6]


def test_the_id_of_another_request_is_refused_and_that_one_goes_on() -> None:
    driver = Driver()
    driver.accept("a", 7)
    answer = adopt(driver, (5,))
    assert isinstance(answer, Rejected)
    assert answer.error.kind == "duplicate_request"
    assert not driver.core.idle


@pytest.mark.parametrize(
    ("tokens", "field"),
    [((ids(1000),), "tokens"), ((ids(-1),), "tokens"), ((ids(*range(9)),), "tokens"), ((ids(1), ids(2)), "tokens")],
)
def test_tokens_that_cannot_be_are_refused(tokens: tuple[Any, ...], field: str) -> None:
    driver = Driver()
    answer = driver.core.adopt(1, Resume(9, "a", (0,), tokens, submission()), 0.0)
    assert isinstance(answer, Rejected)
    assert answer.error.field == field


def test_adopting_is_bounded_by_what_the_one_before_could_hold() -> None:
    driver = Driver(max_waiting=2, max_num_seqs=2)
    taken = 0
    for number in range(9):
        submit = submission(f"r{number}")
        answer = driver.core.adopt(1, Resume(9, f"r{number}", (0,), (NO_I32,), submit), 0.0)
        taken += isinstance(answer, Resumed)
    assert taken == 4
