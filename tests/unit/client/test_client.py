"""AsyncEngine against a scripted coordinator behind a real socket."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drumline.engine import client
from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.engine.connection import Connection, Timing
from drumline.engine.errors import (
    DrumlineError,
    DuplicateRequest,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    StartFailed,
)
from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    Ack,
    Behind,
    CallRanks,
    CallRanksResult,
    Cancel,
    Cancelled,
    Failed,
    Goodbye,
    HelloClient,
    LogprobEntry,
    RankAnswer,
    Rejected,
    Resume,
    Resumed,
    StatusQuery,
    Stop,
    StreamEnd,
    Submit,
)
from tests.unit.client.fake_coordinator import ANSWER_WITHIN_S, FakeCoordinator, i32, serving

Served = tuple[AsyncEngine, FakeCoordinator]


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(monkeypatch, tmp_path) as both:
        yield both


async def read(engine: AsyncEngine, prompt: Any = "hi", params: SamplingParams | None = None, **options: Any) -> Any:
    """A task that collects all outputs of one request."""

    async def collect() -> list[RequestOutput]:
        return [out async for out in engine.generate(prompt, params, **options)]

    return asyncio.create_task(collect())


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(ANSWER_WITHIN_S):
        return await awaitable


async def test_a_request_carries_what_was_asked_and_its_text_comes_back(served: Served) -> None:
    engine, fake = served
    params = SamplingParams(max_tokens=5, temperature=0.5, seed=3, stop_token_ids=[9])
    reader = await read(engine, "hé", params, request_id="r1", priority=-2, data_parallel_rank=1)
    submit, (handle,) = await fake.accept()
    assert submit.prompt.tolist() == list("hé".encode())
    assert (submit.request_id, submit.max_tokens, submit.priority, submit.data_parallel_rank) == ("r1", 5, -2, 1)
    assert (submit.seed_given, submit.sampling.seed, submit.sampling.stop_token_ids) == (True, 3, (9,))
    fake.tokens(handle, 0, b"ab")
    fake.tokens(handle, 2, b"c")
    fake.finish(submit, handle, 3)
    outs = await within(reader)
    assert "".join(out.text_delta for out in outs) == "abc" == outs[-1].text
    assert [token for out in outs for token in out.token_ids_delta] == list(b"abc") == outs[-1].token_ids
    assert [out.finished for out in outs] == [False] * (len(outs) - 1) + [True]
    assert outs[-1].finish_reason == "length"
    assert outs[-1].prompt == "hé"


async def test_max_tokens_none_goes_up_to_the_context(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, list(b"1234"), SamplingParams(max_tokens=None))
    submit, (handle,) = await fake.accept()
    assert submit.max_tokens == 996
    fake.finish(submit, handle, 0)
    await within(reader)


async def test_token_ids_of_numpy_and_text_make_the_same_prompt(served: Served) -> None:
    engine, fake = served
    readers = [await read(engine, prompt) for prompt in ("abc", [97, 98, 99], np.array([97, 98, 99]))]
    prompts = []
    for _ in readers:
        submit, (handle,) = await fake.accept()
        prompts.append(submit.prompt.tolist())
        fake.finish(submit, handle, 0)
    assert prompts == [[97, 98, 99]] * 3
    await within(asyncio.gather(*readers))


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([1, 257], "257"),
        ([-1], "-1"),
        ([1, "a"], "str"),
        ([True], "bool"),
        ([1.5], "float"),
        (b"abc", "bytes"),
        (None, "NoneType"),
        ("a\ud800", "surrogate"),
        (np.array([1.5]), "float"),
        (np.array(5), "without a dimension"),
        ([1] * 1000, "1000 tokens"),
        ("x" * 60_000, "60000 tokens"),
    ],
)
async def test_a_prompt_that_cannot_be_served_is_refused_with_what_was_found(
    served: Served, prompt: Any, found: str
) -> None:
    engine, _ = served
    with pytest.raises(InvalidRequest, match=found) as caught:
        await within(await read(engine, prompt))
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"request_id": 7}, "request_id"),
        ({"request_id": "a\ud800"}, "request_id"),
        ({"data_parallel_rank": 2}, "data_parallel_rank"),
        ({"data_parallel_rank": -1}, "data_parallel_rank"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"params": {"n": 1}}, "params"),
        ({"params": SamplingParams(stop_token_ids=[257])}, "stop_token_ids"),
    ],
)
async def test_an_option_that_cannot_be_served_is_refused_by_name(
    served: Served, options: dict[str, Any], field: str
) -> None:
    engine, fake = served
    with pytest.raises(InvalidRequest) as caught:
        await within(await read(engine, "hi", **options))
    assert caught.value.field == field
    await read(engine, "hi", request_id="the next")
    assert (await fake.expect(Submit)).request_id == "the next"


async def test_a_message_that_cannot_be_encoded_fails_its_sender_alone(served: Served) -> None:
    engine, fake = served
    connection = engine._connection
    assert connection is not None
    with pytest.raises(UnicodeEncodeError):
        connection.cancel_quietly("\ud800")
    asking = asyncio.create_task(engine.status())
    await fake.expect(StatusQuery)
    asking.cancel()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"method": "\ud800"}, "method"),
        ({"method": 5}, "method"),
        ({"method": "ping", "timeout": "1"}, "timeout"),
        ({"method": "ping", "timeout": float("nan")}, "timeout"),
        ({"method": "ping", "timeout": float("inf")}, "timeout"),
        ({"method": "ping", "args": (2**70,)}, "args"),
        ({"method": "ping", "args": (object(),)}, "args"),
        ({"method": "ping", "args": ("\ud800",)}, "args"),
        ({"method": "ping", "args": (b"x" * (1 << 20),)}, "args"),
    ],
)
async def test_a_control_call_that_cannot_travel_is_refused_by_name(
    served: Served, call: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await served[0].collective_rpc(**call)
    assert caught.value.field == field


async def test_a_stop_string_ends_the_stream_at_once_and_tells_the_engine_where(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(stop="END", max_tokens=50), request_id="r")
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"one E")
    fake.tokens(handle, 5, b"NDxyz")
    outs = await within(reader)
    stop = await fake.expect(Stop)
    assert (stop.request_id, stop.index, stop.num_tokens) == ("r", 0, 7)
    assert outs[-1].text == "one "
    assert outs[-1].token_ids == list(b"one END")
    assert (outs[-1].finish_reason, outs[-1].stop_reason) == ("stop", "END")
    fake.finish(submit, handle, 7, reason="stop")


async def test_the_end_of_sequence_token_has_no_text_and_no_stop_reason(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(stop_token_ids=[33], max_tokens=9))
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, [97, 256])
    fake.finish(submit, handle, 2, reason="stop", stop=256)
    last = (await within(reader))[-1]
    assert (last.text, last.token_ids, last.stop_reason) == ("a", [97, 256], None)


async def test_a_stop_token_is_the_stop_reason(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(stop_token_ids=[33], max_tokens=9))
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"a!")
    fake.finish(submit, handle, 2, reason="stop", stop=33)
    last = (await within(reader))[-1]
    assert (last.text, last.token_ids, last.finish_reason, last.stop_reason) == ("a", [97, 33], "stop", 33)


async def test_each_of_n_sequences_is_told_apart_and_finishes_once(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(n=3, max_tokens=2))
    submit, handles = await fake.accept()
    for index, handle in enumerate(handles):
        fake.tokens(handle, 0, [97 + index, 98])
        fake.finish(submit, handle, 2, index=index)
    outs = await within(reader)
    last = {out.index: out.text for out in outs if out.finished}
    assert last == {0: "ab", 1: "bb", 2: "cb"}
    assert sum(out.finished for out in outs) == 3


async def test_a_slow_reader_gets_fewer_and_larger_deltas(served: Served) -> None:
    engine, fake = served
    outputs = engine.generate("hi", SamplingParams(max_tokens=200), request_id="r")
    first = asyncio.create_task(anext(outputs))
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"a")
    await within(first)
    connection, _ = engine._require_ready()
    released = connection.inbox.requests["r"].released
    for position in range(1, 100):
        fake.tokens(handle, position, b"b")
    fake.finish(submit, handle, 100)
    await within(released.wait())
    rest = [out async for out in outputs]
    assert len(rest) == 1
    assert rest[0].text_delta == "b" * 99


async def test_logprobs_come_by_position_with_the_sampled_token_first(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(logprobs=2, max_tokens=1))
    submit, (handle,) = await fake.accept()
    best = np.array([-0.5, -0.75], dtype=np.float32)
    fake.tokens(handle, 0, b"c", (LogprobEntry(99, -1.5, 3, i32(97, 98), best),))
    fake.finish(submit, handle, 1)
    (logprobs,) = (await within(reader))[-1].logprobs
    assert list(logprobs) == [99, 97, 98]
    assert [(entry.rank, entry.decoded_token) for entry in logprobs.values()] == [(3, "c"), (1, "a"), (2, "b")]


async def test_a_repeat_is_dropped_and_a_gap_is_asked_for(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(max_tokens=9), request_id="r")
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"ab")
    fake.tokens(handle, 0, b"ab")
    fake.tokens(handle, 4, b"e")
    resume = await fake.expect(Resume)
    assert (resume.request_id, resume.positions) == ("r", (2,))
    fake.tokens(handle, 5, b"f")
    fake.send(Resumed(resume.call_id, "r", submit.prompt, i32(70), (i32(*b"abcdef"),)))
    fake.tokens(70, 6, b"g")
    fake.finish(submit, 70, 7)
    outs = await within(reader)
    assert "".join(out.text_delta for out in outs) == "abcdefg"
    assert not any(isinstance(message, Resume) for message in fake.received)


async def test_a_reader_told_that_it_is_behind_resumes_every_live_request(served: Served) -> None:
    engine, fake = served
    readers = [await read(engine, "hi", SamplingParams(max_tokens=9), request_id=name) for name in ("a", "b")]
    streams = [await fake.accept() for _ in readers]
    fake.tokens(streams[0][1][0], 0, b"x")
    fake.send(Behind(fake.frame))
    resumes = {resume.request_id: resume for resume in [await fake.expect(Resume) for _ in readers]}
    assert {name: resume.positions for name, resume in resumes.items()} == {"a": (1,), "b": (0,)}
    for (submit, (handle,)), text in zip(streams, (b"xyz", b"uvw"), strict=True):
        end = StreamEnd(handle, submit.request_id, 0, "length", -1, 3)
        call_id = resumes[submit.request_id].call_id
        fake.send(Resumed(call_id, submit.request_id, submit.prompt, i32(handle), (i32(*text),), (end,)))
    outs = await within(asyncio.gather(*readers))
    assert [out[-1].text for out in outs] == ["xyz", "uvw"]


async def test_a_lost_frame_is_noticed_even_when_it_held_an_end(served: Served) -> None:
    engine, fake = served
    readers = [await read(engine, "hi", SamplingParams(max_tokens=9), request_id=name) for name in ("a", "b")]
    (one, (handle,)), (other, (last,)) = [await fake.accept() for _ in readers]
    fake.tokens(handle, 0, b"x")
    fake.frame += 1
    fake.tokens(last, 0, b"y")
    resumes = {resume.request_id: resume for resume in [await fake.expect(Resume) for _ in readers]}
    for submit, number, text in ((one, handle, b"x"), (other, last, b"y")):
        end = StreamEnd(number, submit.request_id, 0, "length", -1, 1)
        call_id = resumes[submit.request_id].call_id
        fake.send(Resumed(call_id, submit.request_id, submit.prompt, i32(number), (i32(*text),), (end,)))
    outs = await within(asyncio.gather(*readers))
    assert [out[-1].text for out in outs] == ["x", "y"]


async def test_a_resume_that_is_refused_fails_the_request_with_the_reason(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    _, (handle,) = await fake.accept()
    fake.tokens(handle, 3, b"x")
    resume = await fake.expect(Resume)
    fake.send(Rejected(resume.call_id, "r", ErrorInfo(kind="request_failed", text="no such request")))
    with pytest.raises(RequestFailed, match="no such request"):
        await within(reader)


async def test_frames_are_acknowledged_every_sixteen_and_ends_at_once(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(max_tokens=200))
    submit, (handle,) = await fake.accept()
    for position in range(16):
        fake.tokens(handle, position, b"a")
    assert (await fake.expect(Ack)).frame == 16
    fake.finish(submit, handle, 16)
    assert (await fake.expect(Ack)).frame == 17
    await within(reader)


async def test_leaving_the_loop_cancels_at_once(served: Served) -> None:
    engine, fake = served

    async def leave() -> None:
        async for _ in engine.generate("hi", request_id="r"):
            break

    leaving = asyncio.create_task(leave())
    _, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"a")
    await within(leaving)
    assert (await fake.expect(Cancel)).request_id == "r"


async def test_closing_the_iterator_cancels_at_once(served: Served) -> None:
    engine, fake = served
    outputs = engine.generate("hi", request_id="r")
    first = asyncio.create_task(anext(outputs))
    _, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"a")
    await within(first)
    await outputs.aclose()
    assert (await fake.expect(Cancel)).request_id == "r"
    with pytest.raises(StopAsyncIteration):
        await anext(outputs)


@pytest.mark.parametrize("accepted", [True, False])
async def test_cancelling_the_task_that_reads_cancels_the_request(served: Served, accepted: bool) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    if accepted:
        await fake.accept()
    else:
        await fake.expect(Submit)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert (await fake.expect(Cancel)).request_id == "r"


async def test_an_id_that_was_left_is_free_once_the_engine_has_confirmed(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    await fake.accept()
    reader.cancel()
    cancel = await fake.expect(Cancel)
    again = await read(engine, "hi", request_id="r")
    await asyncio.sleep(0)
    assert not any(isinstance(message, Submit) for message in fake.received)
    fake.send(Cancelled(cancel.call_id, "r"))
    submit, (handle,) = await fake.accept()
    fake.finish(submit, handle, 0)
    assert (await within(again))[-1].finished


async def test_an_id_that_is_running_is_refused(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    submit, (handle,) = await fake.accept()
    with pytest.raises(DuplicateRequest, match="'r'"):
        await within(await read(engine, "hi", request_id="r"))
    fake.finish(submit, handle, 0)
    await within(reader)


async def test_cancel_returns_when_it_is_confirmed_and_the_reader_sees_abort(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", SamplingParams(n=2), request_id="r")
    _, handles = await fake.accept()
    fake.tokens(handles[0], 0, b"a")
    cancelling = asyncio.create_task(engine.cancel("r"))
    cancel = await fake.expect(Cancel)
    assert not cancelling.done()
    fake.send(Cancelled(cancel.call_id, "r"))
    await within(cancelling)
    outs = await within(reader)
    assert [(out.index, out.finish_reason) for out in outs if out.finished] == [(0, "abort"), (1, "abort")]


async def test_a_late_confirmation_does_not_end_the_next_request_with_that_id(served: Served) -> None:
    engine, fake = served
    first = await read(engine, "hi", request_id="r")
    submit, (handle,) = await fake.accept()
    cancelling = asyncio.create_task(engine.cancel("r"))
    cancel = await fake.expect(Cancel)
    fake.finish(submit, handle, 0)
    await within(first)
    await fake.expect(Ack)
    second = await read(engine, "hi", request_id="r")
    again, (handle,) = await fake.accept()
    fake.send(Cancelled(cancel.call_id, "r"))
    await within(cancelling)
    fake.tokens(handle, 0, b"a")
    fake.finish(again, handle, 1)
    outs = await within(second)
    assert (outs[-1].finish_reason, outs[-1].text) == ("length", "a")


async def test_a_submission_without_an_answer_is_cancelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(monkeypatch, tmp_path, timing=Timing(answer_s=0.2)) as (engine, fake):
        reader = await read(engine, "hi", request_id="r")
        await fake.expect(Submit)
        with pytest.raises(RequestFailed, match="did not answer"):
            await within(reader)
        assert (await fake.expect(Cancel)).request_id == "r"


async def test_a_refusal_of_the_engine_is_raised_as_its_own_class(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    submit = await fake.expect(Submit)
    fake.send(Rejected(submit.call_id, "r", ErrorInfo(kind="queue_full", text="9 wait", retryable=True)))
    with pytest.raises(QueueFull, match="9 wait") as caught:
        await within(reader)
    assert caught.value.info.retryable


async def test_one_failed_request_ends_alone(served: Served) -> None:
    engine, fake = served
    bad, good = [await read(engine, "hi", request_id=name) for name in ("bad", "good")]
    await fake.accept()
    submit, (handle,) = await fake.accept()
    fake.send(Failed("bad", ErrorInfo(kind="request_failed", text="numeric", rank=1)))
    with pytest.raises(RequestFailed, match="numeric") as caught:
        await within(bad)
    assert caught.value.rank == 1
    fake.finish(submit, handle, 0)
    assert (await within(good))[-1].finished


async def test_when_the_engine_fails_every_stream_and_call_gets_the_typed_error(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi")
    await fake.accept()
    asking = asyncio.create_task(engine.status())
    info = ErrorInfo(kind="request_failed", text="rank 1 was killed by signal 9", rank=1, retryable=True)
    fake.send(Failed("", info))
    for waiting in (reader, asking):
        with pytest.raises(RequestFailed, match="rank 1") as caught:
            await within(waiting)
        assert caught.value.rank == 1
    with pytest.raises(EngineClosed, match="rank 1"):
        await within(await read(engine, "hi"))


async def test_a_lost_connection_ends_every_stream_with_the_cause_that_the_launcher_knows(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi")
    await fake.accept()
    fake.vanish()
    fake.failed.set_result(ErrorInfo(kind="engine_closed", text="the coordinator was killed by signal 9"))
    with pytest.raises(EngineClosed, match="signal 9"):
        await within(reader)


async def test_a_coordinator_that_falls_silent_ends_every_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = Timing(tick_s=0.02, probe_s=0.05, silence_s=0.3, answer_s=5.0)
    async with serving(monkeypatch, tmp_path, timing=quick) as (engine, fake):
        reader = await read(engine, "hi")
        await fake.accept()
        assert (await fake.expect(StatusQuery)).call_id
        with pytest.raises(EngineClosed, match="nothing heard"):
            await within(reader)


async def test_a_call_without_an_answer_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(monkeypatch, tmp_path, timing=Timing(answer_s=0.1)) as (engine, _):
        with pytest.raises(RequestFailed, match=r"within 0\.1 s"):
            await within(engine.status())


async def test_collective_rpc_returns_replies_by_rank(served: Served) -> None:
    engine, fake = served
    calling = asyncio.create_task(engine.collective_rpc("ping", timeout=2.0))
    call = await fake.expect(CallRanks)
    assert (call.method, call.timeout_s) == ("ping", 2.0)
    error = ErrorInfo(kind="request_failed", text="late", rank=1)
    fake.send(CallRanksResult(call.call_id, (RankAnswer(1, False, b"", error), RankAnswer(0, True, b"\x07"))))
    replies = await within(calling)
    assert [(reply.rank, reply.ok, reply.value, reply.error) for reply in replies] == [
        (0, True, 7, None),
        (1, False, None, error),
    ]


async def test_a_second_reader_takes_over_from_a_position(served: Served) -> None:
    engine, fake = served
    outputs = engine.generate("hi", SamplingParams(max_tokens=9), request_id="r")
    first = asyncio.create_task(anext(outputs))
    submit, (handle,) = await fake.accept()
    fake.tokens(handle, 0, b"abcd")
    assert (await within(first)).text == "abcd"
    waiting = asyncio.create_task(anext(outputs))
    later = engine.resume("r", (2,))
    out = await within(anext(later))
    assert (out.text, out.text_delta, out.token_ids_delta) == ("abcd", "cd", [99, 100])
    with pytest.raises(RequestFailed, match="newer reader"):
        await within(waiting)
    fake.finish(submit, handle, 4)
    assert [last.finished async for last in later] == [True]
    assert not any(isinstance(message, Cancel) for message in fake.received)


async def test_resume_is_refused_for_an_unknown_id_and_for_positions_that_are_not_there(served: Served) -> None:
    engine, fake = served
    with pytest.raises(InvalidRequest, match="request_id"):
        await within(anext(engine.resume("nobody", (0,))))
    reader = await read(engine, "hi", request_id="r")
    submit, (handle,) = await fake.accept()
    with pytest.raises(InvalidRequest, match="positions"):
        await within(anext(engine.resume("r", (1,))))
    fake.finish(submit, handle, 0)
    await within(reader)


async def test_closing_wakes_every_reader_says_goodbye_and_may_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path) as (engine, fake):
        reader = await read(engine, "hi")
        await fake.accept()
        await within(asyncio.gather(engine.close(), engine.close()))
        with pytest.raises(EngineClosed):
            await within(reader)
        assert fake.closed
        for refused in (engine.status(), engine.cancel("r"), engine.start(), anext(engine.generate("hi"))):
            with pytest.raises(EngineClosed):
                await within(refused)


@pytest.mark.parametrize("swallows", [False, True])
async def test_closing_in_the_middle_of_a_start_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, swallows: bool
) -> None:
    """``swallows``: the processes were already there when the launch was cancelled."""
    fake = FakeCoordinator(f"ipc://{tmp_path}/client.sock")
    launching = asyncio.Event()
    ended: list[str] = []

    async def start_local(config: EngineConfig, on_event: object) -> FakeCoordinator:
        launching.set()
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            ended.append("launch")
            if not swallows:
                raise
        return fake

    monkeypatch.setattr(client, "start_local", start_local)
    engine = AsyncEngine(EngineConfig(model="demo"))
    start = asyncio.create_task(engine.start())
    await within(launching.wait())
    await within(engine.close())
    assert ended == ["launch"]
    assert fake.closed is swallows
    with pytest.raises(StartFailed, match="closed"):
        await within(start)
    await fake.close()


async def test_an_engine_that_was_not_started_says_so() -> None:
    engine = AsyncEngine(EngineConfig(model="demo"))
    with pytest.raises(EngineClosed, match="async with"):
        await engine.status()
    await engine.close()


async def test_a_model_without_tokenizer_serves_ids_and_refuses_text_and_stop_strings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with serving(monkeypatch, tmp_path, tokenizer=b"") as (engine, fake):
        for prompt, params, field in (("hi", None, "prompt"), ([1], SamplingParams(stop="x"), "stop")):
            with pytest.raises(InvalidRequest, match=r"tokenizer\.json") as caught:
                await within(await read(engine, prompt, params))
            assert caught.value.field == field
        reader = await read(engine, [1, 2])
        submit, (handle,) = await fake.accept()
        fake.tokens(handle, 0, [5, 6])
        fake.finish(submit, handle, 2)
        last = (await within(reader))[-1]
        assert (last.text, last.token_ids, last.prompt) == ("", [5, 6], None)


async def test_a_tokenizer_that_does_not_load_fails_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="tokenizer"):
        async with serving(monkeypatch, tmp_path, tokenizer=b"{}"):
            pass


async def test_a_failure_during_the_start_is_raised_by_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeCoordinator(f"ipc://{tmp_path}/client.sock")

    async def start_local(config: EngineConfig, on_event: object) -> FakeCoordinator:
        return fake

    monkeypatch.setattr(client, "start_local", start_local)
    engine = AsyncEngine(EngineConfig(model="demo"))
    start = asyncio.create_task(engine.start())
    await fake.expect(HelloClient)
    fake.send(Failed("", ErrorInfo(kind="start_failed", text="rank 0: no memory", rank=0)))
    with pytest.raises(DrumlineError, match="no memory") as caught:
        await within(start)
    assert caught.value.info.kind == "start_failed"
    assert fake.closed


async def test_a_connection_that_closes_says_goodbye(tmp_path: Path) -> None:
    fake = FakeCoordinator(f"ipc://{tmp_path}/client.sock")
    connection = Connection(fake.endpoint, Timing(), lambda event: None)
    assert (await fake.expect(HelloClient)).client_id == connection.client_id
    closing = asyncio.create_task(connection.close())
    assert (await fake.expect(Goodbye)).client_id == connection.client_id
    await within(closing)
    await fake.close()


async def test_time_in_which_the_app_blocked_its_loop_does_not_count_against_the_coordinator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = Timing(tick_s=0.05, probe_s=10.0, silence_s=0.5, answer_s=5.0)
    async with serving(monkeypatch, tmp_path, timing=quick) as (engine, fake):
        reader = await read(engine, "hi")
        submit, (handle,) = await fake.accept()
        time.sleep(1.0)  # noqa: ASYNC251
        fake.finish(submit, handle, 0)
        assert (await within(reader))[-1].finished
