"""The coordinator at its sockets: who is let in, what readers get, and how it ends. Ranks are simulated."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from drumline.engine import client_connections, client_port, coordinator
from drumline.engine.client_connections import WINDOW
from drumline.engine.core.engine_core import EngineCore
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    BeatClient,
    Behind,
    CallRanks,
    CallRanksResult,
    Cancel,
    Cancelled,
    Event,
    Exited,
    Failed,
    Fault,
    Finished,
    Goodbye,
    HelloSupervisor,
    HelloWorker,
    Kill,
    Rejected,
    Resume,
    Resumed,
    StepDone,
    Stopping,
    Tokens,
    ToWorker,
)
from drumline.protocol.sockets import Dealer
from tests.integration.engine.simulated_ranks import NUM_BLOCKS, PROMPT, SEED, RawClient, SimulatedEngine, simulated
from tests.integration.engine.test_life import ONE, TWO
from tests.simulation.oracle import expected_output


async def test_clients_are_greeted_told_of_the_load_and_welcomed_when_all_is_ready(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root, ranks=False) as engine:
        client = engine.client()
        client.hello()
        assert (await client.read(Event)).kind == "starting"
        status = await client.status()
        assert (status.state, status.groups, len(status.ranks)) == ("starting", (), 2)
        await engine.start_ranks()
        welcome = await client.welcome()
        events = [message for message in client.seen if isinstance(message, Event)]
        assert {event.rank for event in events if event.kind == "loading"} == {0, 1}
        assert events[-1].kind == "ready"
        assert (welcome.version, welcome.info.data_parallel_size) == (PROTOCOL_VERSION, 2)
        assert welcome.tokenizer.startswith(b"{")
        assert (await client.status()).state == "ready"


async def test_a_submission_before_the_engine_is_ready_is_refused_as_retryable(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root, ranks=False) as engine:
        client = engine.client()
        client.hello()
        client.submit("early")
        rejected = await client.read(Rejected)
        assert rejected.request_id == "early"
        assert rejected.error.retryable
        client.dealer.send(Cancel(9, "early"))
        assert (await client.read(Rejected)).call_id == 9


async def test_another_protocol_version_and_strangers_are_turned_away(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        old, stranger, client = engine.client(), engine.client(), engine.client()
        old.hello(version=PROTOCOL_VERSION + 1)
        assert (await old.engine_failure()).kind == "protocol"
        stranger.submit("no hello")
        await client.welcome()
        status = await client.status_when(lambda status: status.counters["client_messages_unknown_peer"] > 0)
        assert status.counters["client_hellos_refused"] == 1
        assert status.requests.accepted == 0


async def test_only_launch_tokens_open_the_workers_side(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        intruder: Dealer[ToWorker] = Dealer(engine.context, engine.order.worker_endpoint, Codec(ToWorker))
        intruder.send(HelloWorker(PROTOCOL_VERSION, "guess", 0, "x", 1, "h"))
        intruder.send(HelloSupervisor(PROTOCOL_VERSION, "guess", 1))
        intruder.send(Exited(0, 1000, 0, 9))
        intruder.send(Stopping("ha"))
        status = await client.status_when(lambda status: status.counters["worker_messages_unknown_peer"] == 2)
        intruder.close()
        assert status.counters["worker_messages_wrong_token"] == 2
        assert status.state == "ready"


async def test_tokens_come_in_numbered_frames_and_the_end_in_the_last(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        accepted = await client.accepted("r", max_tokens=5, n=2)
        assert len(accepted.handles) == 2
        ends: list[int] = []
        while len(ends) < 2:
            ends += [end.index for end in (await client.read(Finished)).ends]
        frames = [message for message in client.seen if isinstance(message, Tokens | Finished)]
        assert [frame.frame for frame in frames] == list(range(1, len(frames) + 1))
        tokens = [frame for frame in frames if isinstance(frame, Tokens)]
        assert sum(len(frame.tokens) for frame in tokens) == 10
        for handle in accepted.handles.tolist():
            positions = [
                int(position)
                for frame in tokens
                for own, position in zip(frame.handles, frame.positions, strict=True)
                if own == handle
            ]
            assert positions == list(range(5))


async def test_a_client_that_acknowledges_nothing_may_submit_no_more(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_port, "MAX_UNREAD", 2)
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        for request_id in ("a", "b", "c"):
            await client.accepted(request_id, max_tokens=1)
            last = await client.read(Finished)
        client.submit("d")
        rejected = await client.read(Rejected)
        assert (rejected.error.kind, rejected.error.retryable) == ("queue_full", True)
        client.dealer.send(Ack(last.frame))
        await client.accepted("d", max_tokens=1)


async def test_a_reader_that_falls_behind_gets_one_behind_and_all_tokens_by_resume(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        slow, other = engine.client(), engine.client()
        await slow.welcome()
        await other.welcome()
        await slow.accepted("slow", max_tokens=WINDOW * 3)
        await other.status_when(lambda status: status.requests.finished == 1)
        # Others do not notice.
        await other.accepted("quick", max_tokens=3)
        await other.read(Finished)

        unread = [message for message in await slow.read_for(0.2) if isinstance(message, Tokens | Finished | Behind)]
        assert len(unread) == WINDOW
        assert all(isinstance(message, Tokens) for message in unread)
        slow.dealer.send(Ack(WINDOW))
        assert (await slow.read(Behind)).frame == WINDOW
        slow.dealer.send(Resume(5, "slow", (WINDOW,)))
        resumed = await slow.read(Resumed)
        assert (resumed.call_id, len(resumed.tokens[0]), len(resumed.ends)) == (5, WINDOW * 3, 1)
        delivered = np.concatenate([message.tokens for message in unread if isinstance(message, Tokens)])
        assert (resumed.tokens[0][:WINDOW] == delivered).all()
        # All its ends have been read, so its id is free again.
        slow.dealer.send(Ack((await slow.read(Finished)).frame))
        await slow.accepted("slow", max_tokens=1)


async def test_an_id_is_free_once_its_end_is_acknowledged(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        await client.accepted("r", max_tokens=2)
        finished = await client.read(Finished)
        client.submit("r")
        assert (await client.read(Rejected)).error.kind == "duplicate_request"
        client.dealer.send(Ack(finished.frame))
        await client.accepted("r", max_tokens=2)


@pytest.mark.parametrize("way", ["goodbye", "vanishes", "falls silent"])
async def test_the_requests_of_a_client_that_leaves_are_cancelled(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with simulated(ONE, runtime_root) as engine:
        monkeypatch.setattr(client_connections, "SILENCE_S", 0.5)
        leaver, stayer = engine.client(), engine.client()
        await leaver.welcome()
        await stayer.welcome()
        if way == "falls silent":
            leaver.dealer.send(BeatClient("raw"))
        # No token comes for it, so nothing that is sent to it tells that it is gone.
        engine.ranks[0].answer = lambda done: None
        await leaver.accepted("left", max_tokens=900)
        assert (await stayer.status()).requests.accepted == 1
        if way == "goodbye":
            leaver.dealer.send(Goodbye("raw"))
        elif way == "vanishes":
            leaver.close()
        status = await stayer.status_when(lambda status: status.requests.cancelled == 1)
        assert status.counters["clients"] == 1
        assert status.counters["clients_silent"] == int(way == "falls silent")
        assert status.counters["clients_gone"] == int(way == "vanishes")


async def test_a_cancel_is_confirmed_when_the_blocks_are_free(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        await client.accepted("r", max_tokens=900)
        client.dealer.send(Cancel(4, "r"))
        cancelled = await client.read(Cancelled)
        assert (cancelled.call_id, cancelled.request_id) == (4, "r")
        replica = (await client.status()).replicas[0]
        assert (replica.running, replica.blocks_free) == (0, NUM_BLOCKS)


async def test_calls_have_a_deadline_of_their_own_for_each_rank_and_late_replies_are_dropped(
    runtime_root: Path,
) -> None:
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        engine.ranks[1].answers_calls = False
        began = time.monotonic()
        client.dealer.send(CallRanks(8, "ping", b"", 0.3))
        result = await client.read(CallRanksResult)
        assert 0.25 < time.monotonic() - began < 1.5
        assert [(answer.rank, answer.ok) for answer in result.answers] == [(0, True), (1, False)]
        assert "did not answer ping within 0.3 s" in (result.answers[1].error or ErrorInfo("", "")).text
        client.dealer.send(CallRanks(9, "", b"", 0.3))
        assert (await client.read(Rejected)).error.kind == "invalid_request"


async def read_stream(client: RawClient, handle: int, count: int) -> list[int]:
    """The ``count`` tokens of a stream, each position once. Nothing is acknowledged: all frames of all streams together
    have to be fewer than a reader may leave so."""
    tokens: list[int] = []
    for message in client.seen:
        _note(message, handle, tokens)
    while len(tokens) < count:
        _note(await client.read(Tokens), handle, tokens)
    return tokens


def _note(message: object, handle: int, tokens: list[int]) -> None:
    if not isinstance(message, Tokens):
        return
    for own, position, token in zip(message.handles, message.positions, message.tokens, strict=True):
        if own == handle:
            assert position == len(tokens)
            tokens.append(int(token))


async def test_a_fault_while_serving_is_told_and_every_stream_goes_on(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        welcome = await client.welcome()
        handles = [int((await client.accepted(name, max_tokens=24)).handles[0]) for name in ("a", "b")]
        await client.read(Tokens)
        error = ErrorInfo(kind="internal", text="something odd", traceback="Traceback ...", step=3)
        engine.ranks[1].dealer.send(Fault(1, 1, 1, error))
        fault = await client.event("fault")
        assert (fault.rank, fault.incarnation, fault.epoch) == (1, engine.ranks[1].incarnation, 1)
        assert fault.fault == "exception"
        recovered = await client.event("recovered")
        assert recovered.epoch == 2
        expected = list(expected_output(list(PROMPT), SEED, 0, frozenset(), 0, 24, welcome.info.vocab_size).tokens)
        for handle in handles:
            assert await read_stream(client, handle, 24) == expected
        status = await client.status()
        assert status.state == "ready"
        assert [(one.rank, one.kind, one.epoch) for one in status.faults] == [(1, "exception", 1)]
        assert 0 <= status.faults[0].recovered_s < 10.0
        assert (status.requests.failed, status.groups[0].epoch) == (0, 2)


async def test_a_fault_of_an_idle_engine_is_settled_without_waiting_for_the_next_tick(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "TICK_S", 60.0)
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        engine.ranks[1].dealer.send(Fault(1, 1, 1, ErrorInfo(kind="internal", text="something odd")))
        assert "something odd" in (await client.event("fault")).text
        assert (await client.event("recovered")).epoch == 2


async def test_a_killed_rank_is_replaced_and_its_requests_go_on(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        welcome = await client.welcome()
        handles = [int((await client.accepted(name, max_tokens=20)).handles[0]) for name in ("a", "b", "c")]
        await client.read(Tokens)
        before = engine.ranks[1].incarnation
        engine.kill(1)
        fault = await client.event("fault")
        assert (fault.rank, fault.incarnation, fault.fault) == (1, before, "exit")
        assert (await client.event("respawn")).rank == 1
        joined = await client.event("joined")
        assert joined.rank == 1
        assert engine.ranks[1].incarnation != before
        expected = list(expected_output(list(PROMPT), SEED, 0, frozenset(), 0, 20, welcome.info.vocab_size).tokens)
        for handle in handles:
            assert await read_stream(client, handle, 20) == expected
        status = await client.status()
        assert [rank.state for rank in status.ranks] == ["ready", "ready"]
        assert [rank.restarts for rank in status.ranks] == [0, 1]


async def test_a_reply_that_cannot_be_right_is_the_loss_of_the_rank(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        welcome = await client.welcome()

        def too_many(done: StepDone) -> StepDone:
            return msgspec.structs.replace(done, tokens=np.zeros(7, dtype=np.int32))

        engine.ranks[0].answer = too_many
        accepted = await client.accepted("r")
        fault = await client.event("fault")
        assert (fault.rank, fault.fault) == (0, "protocol")
        assert "impossible reply" in fault.text
        expected = list(expected_output(list(PROMPT), SEED, 0, frozenset(), 0, 8, welcome.info.vocab_size).tokens)
        assert await read_stream(client, int(accepted.handles[0]), 8) == expected
        await engine.supervisor_told(lambda message: isinstance(message, Kill) and message.rank == 0)


async def test_replies_to_steps_that_were_never_sent_are_dropped_and_counted(runtime_root: Path) -> None:
    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        nothing = np.zeros(0, dtype=np.int32)
        for epoch, step in ((1, 50), (0, 0), (2, 0)):
            engine.ranks[0].dealer.send(StepDone(1, epoch, 0, step, nothing, nothing))
        engine.ranks[0].dealer.send(StepDone(1, 1, 3, 0, nothing, nothing))
        status = await client.status_when(lambda status: status.counters["worker_messages_foreign_rank"] == 1)
        assert status.counters["worker_messages_out_of_order"] == 1
        assert status.counters["worker_messages_stale"] == 2
        await client.accepted("r")
        await client.read(Finished)


async def test_a_task_that_dies_ends_the_engine_with_its_traceback(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_core: EngineCore, _now: float) -> None:
        raise ZeroDivisionError("a bug")

    async with simulated(ONE, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        monkeypatch.setattr(EngineCore, "maintain", broken)
        client.submit("r")
        fatal = await client.engine_failure()
        assert fatal.kind == "engine_closed"
        assert "ZeroDivisionError" in fatal.text
        assert "a bug" in fatal.traceback
        assert await engine.run == fatal


async def test_a_supervisor_that_closes_the_engine_ends_live_requests_as_closed(runtime_root: Path) -> None:
    async with simulated(TWO, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        engine.ranks[0].answer = lambda done: None
        await client.accepted("r")
        engine.supervisor.send(Stopping("the app closes"))
        assert (await client.read(Failed)).error.kind == "engine_closed"
        assert "the app closes" in (await client.engine_failure()).text
        assert await engine.run is None


async def test_a_rank_that_hangs_is_told_from_the_one_that_waits_for_it(runtime_root: Path) -> None:
    config = msgspec.structs.replace(TWO, faults=msgspec.structs.replace(TWO.faults, step_deadline_s=0.2))
    async with simulated(config, runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        await client.accepted("warm", max_tokens=20)
        await client.read(Finished)
        await hang(engine, waiting=0, hanging=1)
        await client.accepted("r")
        fault = await client.event("fault")
        assert (fault.rank, fault.fault) == (1, "wedged")
        assert "furthest behind in step" in fault.text
        await client.read(Finished)
        await engine.supervisor_told(lambda message: isinstance(message, Kill) and message.rank == 1)


async def hang(engine: SimulatedEngine, waiting: int, hanging: int) -> None:
    """Neither rank answers in this epoch; one says that it waits inside a collective, the other that it does not."""
    for rank in engine.ranks.values():
        rank.answer = lambda done: done if done.epoch > 1 else None
    engine.ranks[waiting].beat(step=30, inside=True)
    engine.ranks[hanging].beat(step=30, inside=False)
