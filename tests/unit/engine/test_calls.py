"""Control calls to all ranks: answers by rank, deadlines, and replies that come too late."""

from __future__ import annotations

from drumline.engine.calls import MAX_RESULTS_BYTES, MAX_UNANSWERED, OpenCall, RankCalls
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Call, CallRanks, CallRanksResult, CallResult, RankAnswer

TERM = 2


def opened(calls: RankCalls, now: float = 0.0, ranks: int = 2, timeout_s: float = 5.0) -> tuple[OpenCall, list[Call]]:
    result = calls.open(1, CallRanks(40, "ping", b"x", timeout_s), dict.fromkeys(range(ranks), 3), now)
    assert not isinstance(result, ErrorInfo)
    call, sends = result
    assert [rank for rank, _ in sends] == list(range(ranks))
    return call, [message for _, message in sends]


def reply(call: Call, rank: int) -> CallResult:
    return CallResult(TERM, 3, call.call_id, rank, True, b"pong")


def test_a_call_is_complete_when_every_rank_has_answered() -> None:
    calls = RankCalls(TERM)
    call, (first, second) = opened(calls)
    assert (first.term, first.epoch, first.method, first.args) == (TERM, 3, "ping", b"x")
    assert first.call_id != second.call_id
    assert calls.answer(reply(second, 1)) is None
    assert calls.answer(reply(first, 0)) is call
    answers = (RankAnswer(0, True, b"pong"), RankAnswer(1, True, b"pong"))
    assert call.result() == CallRanksResult(40, answers)
    assert calls.next_deadline is None


def test_a_rank_that_does_not_answer_gets_an_error_of_its_own() -> None:
    calls = RankCalls(TERM)
    call, (first, second) = opened(calls, now=1.0, timeout_s=2.0)
    calls.answer(reply(first, 0))
    assert calls.next_deadline == 3.0
    assert calls.expire(2.9) == []
    assert calls.expire(3.0) == [call]
    answers = call.result().answers
    assert answers[0].ok
    assert answers[1].error is not None
    assert "rank 1 did not answer ping within 2 s" in answers[1].error.text
    assert calls.answer(reply(second, 1)) is None
    assert calls.late_replies == 1


def test_a_reply_under_another_ranks_call_id_is_not_taken() -> None:
    calls = RankCalls(TERM)
    call, (first, second) = opened(calls)
    assert calls.answer(reply(first, 1)) is None
    assert calls.answer(reply(second, 0)) is None
    assert call.answers == {}
    assert calls.late_replies == 2


def test_replies_for_a_client_that_left_count_as_late() -> None:
    calls = RankCalls(TERM)
    _, (first, _) = opened(calls)
    calls.drop_connection(1)
    assert calls.answer(reply(first, 0)) is None
    assert calls.late_replies == 1


def test_a_rank_that_cannot_be_reached_completes_what_waits_for_it() -> None:
    calls = RankCalls(TERM)
    call, (first, _) = opened(calls)
    assert calls.unreachable(1, "rank 1 is gone") == []
    assert calls.answer(reply(first, 0)) is call
    assert [answer.ok for answer in call.result().answers] == [True, False]


def test_calls_are_bounded_and_checked() -> None:
    calls = RankCalls(TERM)
    for bad in (
        CallRanks(1, "", b"", 5.0),
        CallRanks(1, "x" * 300, b"", 5.0),
        CallRanks(1, "ping", b"", 0.0),
        CallRanks(1, "ping", b"", float("nan")),
    ):
        refused = calls.open(1, bad, {0: 1}, 0.0)
        assert isinstance(refused, ErrorInfo)
        assert refused.kind == "invalid_request"
    for _ in range(MAX_UNANSWERED):
        _, (last,) = opened(calls, ranks=1)
    # Giving up does not free a place: the rank still has to answer.
    calls.expire(100.0)
    full = calls.open(1, CallRanks(1, "ping", b"", 5.0), {0: 3}, 0.0)
    assert isinstance(full, ErrorInfo)
    assert (full.kind, full.rank) == ("queue_full", 0)
    calls.answer(reply(last, 0))
    opened(calls, ranks=1)


def test_late_answers_free_the_places_of_calls_that_were_given_up() -> None:
    calls = RankCalls(TERM)
    sent = [opened(calls, now=0.0)[1] for _ in range(MAX_UNANSWERED)]
    assert len(calls.expire(5.0)) == MAX_UNANSWERED
    assert (len(calls), calls.owed(0), calls.owed(1)) == (0, MAX_UNANSWERED, MAX_UNANSWERED)
    for first, second in sent:
        calls.answer(reply(first, 0))
        calls.answer(reply(second, 1))
    assert (calls.owed(0), calls.owed(1), calls.late_replies) == (0, 0, 2 * MAX_UNANSWERED)
    call, (first, second) = opened(calls, now=6.0)
    assert calls.answer(reply(first, 0)) is None
    assert calls.answer(reply(second, 1)) is call


def test_an_answer_that_was_not_owed_frees_nothing() -> None:
    calls = RankCalls(TERM)
    _, (first, second) = opened(calls)
    calls.answer(reply(second, 0))
    calls.answer(reply(first, 1))
    assert (calls.owed(0), calls.owed(1)) == (1, 1)
    calls.answer(reply(first, 0))
    calls.answer(reply(first, 0))
    assert (calls.owed(0), calls.owed(1), calls.late_replies) == (0, 1, 3)


def test_a_rank_owes_nothing_of_an_older_epoch() -> None:
    calls = RankCalls(TERM)
    for _ in range(MAX_UNANSWERED):
        opened(calls, ranks=1)
    again = calls.open(1, CallRanks(1, "ping", b"", 5.0), {0: 4}, 0.0)
    assert not isinstance(again, ErrorInfo)
    assert calls.owed(0) == 1


def test_results_that_do_not_fit_one_frame_are_errors_of_their_ranks() -> None:
    calls = RankCalls(TERM)
    call, sends = opened(calls, ranks=3)
    size = MAX_RESULTS_BYTES // 2
    for rank, one in enumerate(sends):
        calls.answer(CallResult(TERM, 3, one.call_id, rank, True, bytes(size)))
    first, second, third = call.result().answers
    assert (first.ok, second.ok, third.ok, third.value) == (True, True, False, b"")
    assert third.error is not None
    assert (third.error.kind, str(size) in third.error.text, str(MAX_RESULTS_BYTES) in third.error.text) == (
        "invalid_request",
        True,
        True,
    )
