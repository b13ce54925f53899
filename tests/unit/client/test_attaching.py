"""Readers of requests that another connection submitted, engines of other processes, and events."""

import asyncio
from pathlib import Path

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.errors import EngineClosed, InvalidConfig, InvalidRequest, RequestFailed
from drumline.engine.events import ROOM, EventStreams
from drumline.engine.prompts import params_from_bytes
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    Event,
    Failed,
    FaultsInjected,
    InjectFaults,
    Injection,
    MessageFault,
    Rejected,
    Resume,
    Resumed,
    Stop,
    StreamEnd,
    Submit,
)
from tests.unit.client.fake_coordinator import FakeCoordinator, Served, i32, read, within

PARAMS = SamplingParams(max_tokens=9, temperature=0.5, seed=4, stop="zz", stop_token_ids=[7])


async def submitted(served: Served) -> Submit:
    """A durable submission as the client library makes it."""
    engine, fake = served
    reader = await read(engine, "hi", PARAMS, request_id="theirs")
    submit, (handle,) = await fake.accept()
    fake.finish(submit, handle, 0)
    await within(reader)
    return submit


async def test_only_requests_whose_id_the_app_chose_outlive_their_connection(served: Served) -> None:
    engine, fake = served
    submits = []
    for request_id in (None, "mine"):
        reader = await read(engine, "hi", request_id=request_id)
        submit, (handle,) = await fake.accept()
        submits.append(submit)
        fake.finish(submit, handle, 0)
        await within(reader)
    assert [submit.durable for submit in submits] == [False, True]
    assert submits[0].nonce != submits[1].nonce


async def test_parameters_travel_with_the_request_and_come_back_whole(served: Served) -> None:
    submit = await submitted(served)
    assert params_from_bytes(submit.client_params) == PARAMS
    assert params_from_bytes(b"") == SamplingParams()
    for wrong in (b"{", b"[]", b'{"nobody": 1}', b'{"n": 0}'):
        with pytest.raises(InvalidRequest):
            params_from_bytes(wrong)


async def test_parameters_that_are_too_large_or_no_text_are_refused_by_name(served: Served) -> None:
    engine, _ = served
    for stop, found in (("x" * 300_000, "bytes"), ("\ud800", "surrogate")):
        with pytest.raises(InvalidRequest, match=found):
            await within(await read(engine, "hi", SamplingParams(stop=stop)))


async def test_a_request_of_another_connection_is_taken_over_from_a_position(served: Served) -> None:
    engine, fake = served
    submit = await submitted(served)
    outputs = engine.resume("theirs", (2,))
    first = asyncio.create_task(anext(outputs))
    resume, (handle,) = await fake.resume(submit, (b"abcd",))
    assert (resume.positions, resume.submit) == ((2,), None)
    fake.tokens(handle, 4, b"z")
    out = await within(first)
    assert out.text_delta[:2] == "cd"
    assert out.prompt_token_ids == list(b"hi")
    fake.tokens(handle, 5, b"z")
    # The stop string of the one who submitted it is matched by the new reader.
    assert (await fake.expect(Stop)).num_tokens == 6
    last = [one async for one in outputs][-1]
    assert (last.text, last.finish_reason, last.stop_reason) == ("abcd", "stop", "zz")


async def test_one_that_was_taken_over_moves_on_to_the_next_coordinator(served: Served) -> None:
    engine, fake = served
    submit = await submitted(served)
    outputs = engine.resume("theirs")
    first = asyncio.create_task(anext(outputs))
    resume, _ = await fake.resume(submit, (b"ab",))
    assert resume.positions == ()
    assert (await within(first)).text == "ab"
    other = await fake.succeeded(2, knows_all=False)
    resume, (handle,) = await other.resume(submit, (b"ab",))
    while resume.submit is None:  # that the first one's end was read may be lost, which is asked for too
        resume, (handle,) = await other.resume(submit, (b"ab",))
    assert (resume.submit.seed_given, resume.submit.sampling.seed, resume.submit.max_tokens) == (True, 1, 9)
    assert resume.submit.sampling.stop_token_ids == (7,)
    other.finish(submit, handle, 2)
    assert [out.finished async for out in outputs] == [True]
    assert not any(isinstance(message, Submit) for message in other.received)


async def test_one_that_has_ended_is_read_to_its_end(served: Served) -> None:
    engine, fake = served
    submit = await submitted(served)
    outputs = engine.resume("theirs", (1,))
    first = asyncio.create_task(anext(outputs))
    await fake.resume(submit, (b"abc",), (StreamEnd(1, "theirs", 0, "length", -1, 3),))
    out = await within(first)
    assert (out.text_delta, out.finish_reason) == ("bc", "length")


async def test_an_id_that_nobody_knows_is_refused_and_so_is_what_another_library_made(served: Served) -> None:
    engine, fake = served
    reading = asyncio.create_task(anext(engine.resume("nobody", (0,))))
    resume = await fake.expect(Resume)
    info = ErrorInfo(kind="invalid_request", text="request_id: found nobody", field="request_id", found="nobody")
    fake.send(Rejected(resume.call_id, "nobody", info))
    with pytest.raises(InvalidRequest, match="nobody"):
        await within(reading)
    reading = asyncio.create_task(anext(engine.resume("foreign", (0,))))
    resume = await fake.expect(Resume)
    fake.send(Resumed(resume.call_id, "foreign", i32(1), i32(0), (i32(),), client_params=b"\xff"))
    with pytest.raises(RequestFailed, match="client_params"):
        await within(reading)


async def test_a_reader_whose_request_was_taken_over_is_told(served: Served) -> None:
    engine, fake = served
    reader = await read(engine, "hi", request_id="r")
    await fake.accept()
    fake.send(Failed("r", ErrorInfo(kind="request_failed", text="request 'r' has a newer reader")))
    with pytest.raises(RequestFailed, match="newer reader"):
        await within(reader)


@pytest.mark.parametrize("positions", [(-1,), ("a",), (True,), 5, (2**40,)])
async def test_positions_that_are_none_are_refused_by_name(served: Served, positions: object) -> None:
    engine, _ = served
    with pytest.raises(InvalidRequest) as caught:
        await within(anext(engine.resume("r", positions)))  # type: ignore[arg-type]
    assert caught.value.field == "positions"


# ------------------------------------------------------------------------------------------------- other processes


async def test_an_engine_of_another_process_serves_whoever_connects(tmp_path: Path) -> None:
    fake = FakeCoordinator(f"ipc://{tmp_path}/engine.sock")
    connecting = asyncio.create_task(AsyncEngine.connect(fake.endpoint))
    await fake.welcome()
    async with await within(connecting) as engine:
        assert engine.endpoint == fake.endpoint
        assert engine.launch is None
        with pytest.raises(InvalidConfig, match="config"):
            engine.config  # noqa: B018
        reader = await read(engine, "hi")
        submit, (handle,) = await fake.accept()
        fake.tokens(handle, 0, b"ab")
        fake.finish(submit, handle, 2)
        assert (await within(reader))[-1].text == "ab"
        with pytest.raises(EngineClosed, match="starts once"):
            await engine.start()
    assert not fake.closed
    with pytest.raises(EngineClosed):
        await engine.status()
    with pytest.raises(EngineClosed, match="closed"):
        async with engine:
            pass
    await fake.close()


@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("tcp://0.0.0.0:5000", "wildcard"),
        ("tcp://192.0.2.1:5000", "CURVE"),
        ("http://localhost", "ipc"),
        ("ipc://relative", "ipc"),
        (7, "ipc"),
    ],
)
async def test_an_endpoint_beyond_this_machine_is_refused_by_name(endpoint: str, found: str) -> None:
    with pytest.raises(InvalidConfig, match=found) as caught:
        await AsyncEngine.connect(endpoint)
    assert caught.value.field == "endpoint"


async def test_where_nobody_listens_connecting_ends(tmp_path: Path) -> None:
    with pytest.raises(EngineClosed, match="nothing heard"):
        await within(AsyncEngine.connect(f"ipc://{tmp_path}/nobody.sock", timeout=0.2))
    with pytest.raises(InvalidConfig, match="timeout"):
        await AsyncEngine.connect(f"ipc://{tmp_path}/nobody.sock", timeout=-1.0)


# --------------------------------------------------------------------------------------------------- events, faults


async def test_events_come_to_every_iterator_and_end_with_the_engine(served: Served) -> None:
    engine, fake = served
    one, two = engine.events(), engine.events()
    fake.send(Event("fault", "rank 1 is lost", rank=1))
    for stream in (one, two):
        assert (await within(anext(stream))).rank == 1
    waiting = asyncio.create_task(anext(one))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(StopAsyncIteration):
        await within(waiting)
    assert [event async for event in engine.events()] == []


async def test_an_iterator_that_nobody_reads_keeps_the_newest_and_counts_the_rest() -> None:
    streams = EventStreams()
    slow = streams.open()
    for number in range(ROOM + 5):
        streams.tell(Event("loading", "", done=number))
    streams.end()
    kept = [event.done async for event in slow]
    assert kept == list(range(5, ROOM + 5))
    assert slow.dropped == 5


async def test_faults_are_ordered_of_the_engine_and_a_refusal_is_raised(served: Served) -> None:
    engine, fake = served
    connection = engine._connection
    assert connection is not None
    ordering = asyncio.create_task(
        connection.inject_faults([Injection(1, 0, "kill")], [MessageFault("drop")], clear=True, full_disk=1)
    )
    order = await fake.expect(InjectFaults)
    assert (len(order.injections), len(order.messages), order.clear, order.full_disk) == (1, 1, True, 1)
    fake.send(FaultsInjected(order.call_id))
    await within(ordering)
    ordering = asyncio.create_task(connection.inject_faults())
    order = await fake.expect(InjectFaults)
    fake.send(FaultsInjected(order.call_id, ErrorInfo(kind="invalid_request", text="fault_injection is off")))
    with pytest.raises(InvalidRequest, match="off"):
        await within(ordering)
