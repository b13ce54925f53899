"""AsyncEngine when its coordinator goes away and another one comes: readers see one stream."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from drumline.engine.errors import DrumlineError, EngineClosed, RequestFailed
from drumline.engine.presence import Timing
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    Accepted,
    Ack,
    CallRanks,
    Cancel,
    Cancelled,
    Event,
    HelloClient,
    Rejected,
    Resume,
    StatusQuery,
    StatusReport,
    Stop,
    StreamEnd,
    Submit,
)
from tests.unit.client.fake_coordinator import FakeCoordinator, Served, i32, read, serving, within


async def test_a_stream_goes_on_with_the_next_coordinator_without_gap_or_repeat(served: Served) -> None:
    engine, fake = served
    events = engine.events()
    reader = await read(engine, "hi", SamplingParams(max_tokens=6, n=2))
    submit, handles = await fake.accept()
    fake.tokens(handles[0], 0, b"abc")
    fake.tokens(handles[1], 0, b"x")
    fake.tokens(handles[1], 1, b"y")
    await asyncio.sleep(0.05)
    other = await fake.succeeded(2)
    resume, handles = await other.resume(submit, (b"abcd", b"xy"))
    assert resume.positions == (3, 2)
    assert (resume.submit, resume.tokens) == (None, ())
    other.tokens(handles[0], 4, b"e")
    other.tokens(handles[1], 2, b"z")
    other.finish(submit, handles[0], 5)
    other.finish(submit, handles[1], 3, index=1)
    outs = await within(reader)
    texts = ["".join(out.text_delta for out in outs if out.index == index) for index in (0, 1)]
    assert texts == ["abcde", "xyz"]
    assert (await other.expect(Ack)).frame <= other.frame
    assert [(await within(anext(events))).kind for _ in range(2)] == ["warning", "term"]
    assert not any(isinstance(message, Cancel) for message in other.received)


async def test_the_client_says_who_it_is_and_which_term_it_has_seen(served: Served) -> None:
    engine, fake = served
    connection = engine._connection
    assert connection is not None
    fake.vanish()
    other = FakeCoordinator(fake.endpoint, term=7)
    fake.successors.append(other)
    hello = await other.welcome()
    assert (hello.client_id, hello.term) == (connection.client_id, 1)


async def test_a_coordinator_of_an_older_term_is_left(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi")
    submit, (handle,) = await fake.accept()
    other = await fake.succeeded(5)
    await other.resume(submit, (b"",))
    stale = await other.succeeded(4)
    # It is not followed: the client says hello again, and nothing else.
    assert (await stale.expect(HelloClient)).term == 5
    assert not any(isinstance(message, Resume) for message in stale.received)
    last = await stale.succeeded(6)
    _, (handle,) = await last.resume(submit, (b"ab",))
    last.finish(submit, handle, 2)
    assert (await within(reader))[-1].text == "ab"


async def test_a_coordinator_that_may_not_know_all_is_told_all(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(max_tokens=6, temperature=0.7, stop="zz"), request_id="r")
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"abc")
    await asyncio.sleep(0.05)
    other = await fake.succeeded(2, knows_all=False)
    resume, (handle,) = await other.resume(submit, (b"abc",))
    assert resume.submit is not None
    assert (resume.submit.nonce, resume.submit.durable) == (submit.nonce, True)
    assert (resume.submit.seed_given, resume.submit.sampling.seed) == (True, 1)
    assert np.array_equal(resume.submit.prompt, submit.prompt)
    assert [one.tolist() for one in resume.tokens] == [list(b"abc")]
    other.finish(submit, handle, 3)
    assert (await within(reader))[-1].text == "abc"


async def test_a_submission_that_was_not_accepted_is_said_again_with_its_nonce(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    first = await fake.expect(Submit)
    other = await fake.succeeded(2)
    submit, (handle,) = await other.accept()
    assert (submit.nonce, submit.call_id) == (first.nonce, first.call_id)
    assert first.nonce
    # The one before may have taken it in and begun: what there is by now is asked for.
    resume, (handle,) = await other.resume(submit, (b"ab",))
    assert resume.positions == (0,)
    other.finish(submit, handle, 2)
    assert (await within(reader))[-1].text == "ab"


async def test_requests_made_while_there_is_no_coordinator_wait_for_the_next(served: Served) -> None:
    engine, fake = served
    fake.vanish()
    await asyncio.sleep(0.05)
    reader = await read(engine, "hi")
    asking = asyncio.create_task(engine.status())
    calling = asyncio.create_task(engine.collective_rpc("ping"))
    await asyncio.sleep(0.05)
    other = FakeCoordinator(fake.endpoint, term=2)
    fake.successors.append(other)
    await other.welcome()
    submit, (handle,) = await other.accept()
    await other.expect(StatusQuery)
    assert (await other.expect(CallRanks)).method == "ping"
    await other.resume(submit, ((),))
    other.finish(submit, handle, 0)
    await within(reader)
    for task in (asking, calling):
        task.cancel()


async def test_of_calls_that_wait_some_are_said_again_and_others_fail_retryably(served: Served) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.status())
    calling = asyncio.create_task(engine.collective_rpc("expert_load"))
    await fake.expect(StatusQuery)
    await fake.expect(CallRanks)
    other = await fake.succeeded(2)
    query = await other.expect(StatusQuery)
    with pytest.raises(RequestFailed, match="not known") as caught:
        await within(calling)
    assert caught.value.retryable
    other.send(StatusReport(query.call_id, b"{}"))
    with pytest.raises(DrumlineError, match="does not decode"):
        await within(asking)


async def test_a_cancel_that_was_not_confirmed_is_said_again(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    submit, _ = await fake.accept()
    cancelling = asyncio.create_task(engine.cancel("r"))
    await fake.expect(Cancel)
    other = await fake.succeeded(2)
    await other.resume(submit, (b"a",))
    cancel = await other.expect(Cancel)
    assert cancel.request_id == "r"
    other.send(Cancelled(cancel.call_id, "r"))
    await within(cancelling)
    assert (await within(reader))[-1].finish_reason == "abort"


async def test_a_request_that_was_left_before_it_was_accepted_is_still_cancelled(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    first = await fake.expect(Submit)
    reader.cancel()
    await fake.expect(Cancel)
    other = await fake.succeeded(2)
    # It may have been taken in: said again it is known by its nonce, and the cancel means it.
    assert (await other.expect(Submit)).nonce == first.nonce
    cancel = await other.expect(Cancel)
    other.send(Cancelled(cancel.call_id, "r"))
    again = await read(engine, "hi", request_id="r")
    submit, (handle,) = await other.accept()
    other.finish(submit, handle, 0)
    await within(again)


async def test_a_stop_that_died_with_the_coordinator_is_told_to_the_next(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(max_tokens=9, stop="c"), request_id="r")
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"abc")
    assert (await fake.expect(Stop)).num_tokens == 3
    assert (await within(reader))[-1].text == "ab"
    other = await fake.succeeded(2)
    await other.resume(submit, (b"abcd",))
    stop = await other.expect(Stop)
    assert (stop.request_id, stop.index, stop.num_tokens) == ("r", 0, 3)


@pytest.mark.parametrize("kind", ["diverged", "invalid_request"])
async def test_what_the_next_coordinator_cannot_take_up_fails_alone_and_is_named(served: Served, kind: str) -> None:
    engine, fake = served
    bad, good = [await read(engine, "hi", request_id=name) for name in ("bad", "good")]
    for _ in range(2):
        submit, _ = await fake.accept()
    other = await fake.succeeded(2)
    resume = await other.expect(Resume)
    assert resume.request_id == "bad"
    other.send(Rejected(resume.call_id, "bad", ErrorInfo(kind=kind, text="request 'bad': token 3 is another")))
    with pytest.raises(RequestFailed, match="'bad'") as caught:
        await within(bad)
    assert caught.value.kind == ("diverged" if kind == "diverged" else "request_failed")
    _, (handle,) = await other.resume(submit, (b"a",))
    other.finish(submit, handle, 1)
    assert (await within(good))[-1].text == "a"


async def test_an_end_whose_acknowledgement_may_have_been_lost_is_read_once_more(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="mine")
    submit, (handle,) = await fake.accept()
    fake.finish(submit, handle, 0)
    await within(reader)
    other = await fake.succeeded(2)
    end = StreamEnd(100, "mine", 0, "length", -1, 0)
    resume, _ = await other.resume(submit, ((),), (end,))
    assert (resume.request_id, resume.positions) == ("mine", (0,))


async def test_a_mute_coordinator_is_given_up_for_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick = Timing(tick_s=0.02, probe_s=0.05, silence_s=0.3, answer_s=5.0)
    async with serving(monkeypatch, tmp_path, timing=quick) as (engine, fake):
        reader = await read(engine, "hi")
        submit, _ = await fake.accept()
        assert (await fake.expect(StatusQuery)).call_id
        fake.term = 2
        await fake.welcome()
        fake.frame = 0
        _, (handle,) = await fake.resume(submit, (b"ab",))
        fake.finish(submit, handle, 2)
        assert (await within(reader))[-1].text == "ab"


async def test_without_another_coordinator_the_engine_ends_when_the_lease_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = Timing(tick_s=0.02, lease_s=0.2, answer_s=0.1)
    async with serving(monkeypatch, tmp_path, timing=quick) as (engine, fake):
        reader = await read(engine, "hi")
        await fake.accept()
        fake.vanish()
        # A call's own time stands still meanwhile: it ends with the engine, not before.
        await asyncio.sleep(0.05)
        asking = asyncio.create_task(engine.status())
        for waiting in (reader, asking):
            with pytest.raises(EngineClosed, match="no coordinator has taken over"):
                await within(waiting)


async def test_a_submission_without_an_answer_is_said_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick = Timing(tick_s=0.02, repeat_s=0.1)
    async with serving(monkeypatch, tmp_path, timing=quick) as (engine, fake):
        reader = await read(engine, "hi")
        first = await fake.expect(Submit)
        again = await fake.expect(Submit)
        assert (again.nonce, again.call_id) == (first.nonce, first.call_id)
        handles = fake.handles(1)
        fake.send(Accepted(again.call_id, again.request_id, i32(*handles), 1))
        _, (handle,) = await fake.resume(again, ((),))
        fake.finish(again, handle, 0)
        assert (await within(reader))[-1].finished


async def test_another_engine_at_the_same_endpoint_is_not_mistaken_for_this_one(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi")
    await fake.accept()
    fake.vanish()
    other = FakeCoordinator(fake.endpoint, term=2)
    fake.successors.append(other)
    await other.welcome(tokenizer=b"")  # a model that has none
    with pytest.raises(EngineClosed, match="another engine"):
        await within(reader)


async def test_the_app_is_told_when_coordinators_go_and_come(served: Served) -> None:
    engine, fake = served
    events: list[Event] = []
    engine._on_event = events.append
    other = await fake.succeeded(3)
    asking = asyncio.create_task(engine.status())
    await other.expect(StatusQuery)
    asking.cancel()
    assert [(event.kind, event.term) for event in events] == [("warning", 1), ("term", 3)]
    assert events[1].seconds > 0.0
