"""AsyncEngine and requests that are left, cancelled, or asked for twice."""

import asyncio
from pathlib import Path

import pytest

from drumline.engine.errors import (
    DuplicateRequest,
    RequestFailed,
)
from drumline.engine.presence import Timing
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import (
    Ack,
    Cancel,
    Cancelled,
    Submit,
)
from tests.unit.client.fake_coordinator import Served, read, serving, within


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
