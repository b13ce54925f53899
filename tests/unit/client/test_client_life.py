"""How AsyncEngine starts, fails and closes, against a scripted coordinator behind a real socket."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from drumline.engine import client
from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.engine.connection import Connection
from drumline.engine.errors import (
    DrumlineError,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    StartFailed,
)
from drumline.engine.presence import Timing
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    CallRanks,
    CallRanksResult,
    Cancel,
    Failed,
    Goodbye,
    HelloClient,
    LayoutFacts,
    LayoutQuery,
    RankAnswer,
    Rejected,
    Submit,
)
from tests.unit.client.fake_coordinator import FakeCoordinator, Served, read, serving, within


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


async def test_resume_is_refused_for_positions_that_are_not_there(served: Served) -> None:
    engine, fake = served
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


async def test_a_layout_that_does_not_decode_is_a_typed_error(served: Served) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.layout())
    query = await fake.expect(LayoutQuery)
    fake.send(LayoutFacts(query.call_id, b"{}", np.zeros((0, 0), dtype=np.int32)))
    with pytest.raises(ProtocolError, match="layout does not decode"):
        await within(asking)
