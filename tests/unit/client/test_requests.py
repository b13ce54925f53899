"""Requests of AsyncEngine against a scripted coordinator behind a real socket: what goes out, what comes back."""

import asyncio
from typing import Any

import numpy as np
import pytest

from drumline.engine.errors import (
    InvalidRequest,
    RequestFailed,
)
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    Ack,
    Behind,
    LogprobEntry,
    Rejected,
    Resume,
    Resumed,
    StatusQuery,
    Stop,
    StreamEnd,
    Submit,
)
from tests.unit.client.fake_coordinator import Served, i32, read, within


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
