from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from drumline.protocol import transport
from drumline.protocol.codec import Codec, DecodeError
from drumline.protocol.errors import EngineClosed, InvalidConfig
from drumline.protocol.messages import Beat, Call, FromWorkerSide, Shutdown, StepDone, ToWorker
from drumline.protocol.sockets import Dealer, Router, SendResult, ThreadDealer

from .conftest import Run, StartPeer

IN: Codec[Any] = Codec(FromWorkerSide)
OUT: Codec[Any] = Codec(ToWorker)
Context = zmq.Context[Any]


def call(number: int, padding: int = 0) -> Call:
    return Call(1, 1, number, "ping", bytes(padding))


async def eventually(true: Callable[[], bool]) -> None:
    """Give the loop turns until ``true``; the test's own deadline bounds it."""
    while not true():  # noqa: ASYNC110 - most of what is waited for happens in ZeroMQ's own thread
        await asyncio.sleep(0.001)


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, folder: Path) -> str:
    return f"ipc://{folder}/s" if request.param == "ipc" else "tcp://127.0.0.1:0"


# --------------------------------------------------------------------------------------------------------- the way


def test_messages_go_both_ways(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = Dealer(context, router.endpoint, OUT)
        tokens = np.arange(2000, dtype=np.int32)
        assert dealer.send(StepDone(1, 1, 0, 7, tokens, tokens[:3])) is SendResult.SENT
        identity, message = await router.recv()
        assert isinstance(message, StepDone)
        np.testing.assert_array_equal(message.tokens, tokens)
        assert router.send(identity, call(1)) is SendResult.SENT
        assert router.send_encoded(identity, OUT.encode(call(2))) is SendResult.SENT
        assert [await dealer.recv(), await dealer.recv()] == [call(1), call(2)]
        assert router.statistics().received == 1
        assert router.statistics().sent == 2
        dealer.close()
        router.close()

    run(main())


def test_a_free_port_is_told_and_bound_on_loopback_only(run: Run, context: Context) -> None:
    async def main() -> None:
        router = Router(context, "tcp://127.0.0.1:0", IN)
        port = int(router.endpoint.rpartition(":")[2])
        assert listening_addresses(port) == {"0100007F"}
        router.close()

    run(main())


def listening_addresses(port: int) -> set[str]:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}


def test_a_socket_file_is_private_and_goes_with_its_socket(run: Run, context: Context, folder: Path) -> None:
    async def main() -> None:
        router = Router(context, f"ipc://{folder}/s", IN)
        assert (folder / "s").stat().st_mode & 0o777 == 0o600
        with pytest.raises(InvalidConfig, match="no other process"):
            Router(context, f"ipc://{folder}/s", IN)
        router.close()

    run(main())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("refused", ["tcp://0.0.0.0:0", "tcp://*:0", "ipc://relative", "tcp://10.1.2.3:0"])
def test_endpoints_that_are_not_allowed_are_refused_on_both_sides(run: Run, context: Context, refused: str) -> None:
    async def main() -> None:
        with pytest.raises(InvalidConfig):
            Router(context, refused, IN)
        with pytest.raises(InvalidConfig):
            Dealer(context, refused, OUT)
        with pytest.raises(InvalidConfig):
            ThreadDealer(context, refused, OUT)

    run(main())


def test_an_address_in_use_is_refused(run: Run, context: Context) -> None:
    async def main() -> None:
        router = Router(context, "tcp://127.0.0.1:0", IN)
        with pytest.raises(InvalidConfig, match="in use"):
            Router(context, router.endpoint, IN)
        router.close()

    run(main())


def test_a_dealer_may_come_before_its_router(run: Run, context: Context, folder: Path) -> None:
    async def main() -> None:
        dealer = Dealer(context, f"ipc://{folder}/s", OUT)
        dealer.send(Beat(1))
        router = Router(context, f"ipc://{folder}/s", IN)
        assert (await router.recv())[1] == Beat(1)
        assert not dealer.lost
        dealer.close()
        router.close()

    run(main())


def test_a_receiver_that_waits_is_woken_though_sends_go_on(run: Run, context: Context, endpoint: str) -> None:
    # Sending works off the mailbox that announces input; without care the announcement is lost.
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(0))
        identity, _ = await router.recv()

        async def flood() -> None:
            for number in range(900):
                assert router.send(identity, call(number)) is SendResult.SENT
                if number % 7 == 0:
                    await asyncio.sleep(0)

        async def echo() -> None:
            for number in range(900):
                assert await dealer.recv() == call(number)
                assert dealer.send(Beat(number)) is SendResult.SENT

        async with asyncio.TaskGroup() as group:
            group.create_task(flood())
            group.create_task(echo())
            for number in range(900):
                assert (await router.recv())[1] == Beat(number)
        dealer.close()
        router.close()

    run(main())


def test_a_flooded_receiver_lets_other_tasks_run(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        raw = context.socket(zmq.DEALER)
        raw.connect(router.endpoint)
        for _ in range(500):
            raw.send(b"\xc1")
        for number in range(500):
            raw.send_multipart(IN.encode(Beat(number)))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count_turns())
        for number in range(500):
            assert (await router.recv())[1] == Beat(number)
        counter.cancel()
        assert turns >= 20
        raw.close(0)
        router.close()

    run(main())


# ---------------------------------------------------------------------------------------------- what a send may be


def test_a_send_to_nobody_is_gone(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        assert router.send(b"nobody", call(1)) is SendResult.GONE
        assert router.statistics().gone == 1
        assert router.statistics().sent == 0
        router.close()

    run(main())


def test_a_peer_that_was_killed_is_gone(run: Run, context: Context, endpoint: str, start_peer: StartPeer) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        process = start_peer(router.endpoint)
        identity, message = await router.recv()
        assert message == Beat(process.pid)
        assert router.send(identity, call(1)) is SendResult.SENT
        assert (await router.recv())[1] == Beat(1)
        process.kill()
        process.wait(10)
        await eventually(lambda: router.send(identity, call(2)) is SendResult.GONE)
        await eventually(lambda: router.statistics().disconnected == 1)
        router.close()

    run(main())


def test_a_peer_that_does_not_read_is_full_and_the_others_are_served(
    run: Run, context: Context, endpoint: str, start_peer: StartPeer
) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN, hwm=8)
        process = start_peer(router.endpoint)
        stopped, _ = await router.recv()
        other = Dealer(context, router.endpoint, OUT)
        other.send(Beat(0))
        awake, _ = await router.recv()
        os.kill(process.pid, signal.SIGSTOP)
        sent = 0
        while router.send(stopped, call(sent, padding=100_000)) is SendResult.SENT:
            sent += 1
            assert sent < 10_000
        assert router.statistics().full == 1
        assert router.send(awake, call(5)) is SendResult.SENT
        assert await other.recv() == call(5)
        os.kill(process.pid, signal.SIGCONT)
        answers = [(await router.recv())[1] for _ in range(sent)]
        assert answers == [Beat(number + 1) for number in range(sent)]
        other.close()
        router.close()

    run(main())


@pytest.mark.timeout(60)
def test_a_peer_that_goes_while_its_messages_wait_unread_takes_nobody_along(folder: Path) -> None:
    """In a process of its own, because what is feared here is the abort of the process."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.unit.protocol.unread", f"ipc://{folder}/unread.sock"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "1000 messages, then the end\n", "")


def test_sends_after_close_are_gone(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        identity, _ = await router.recv()
        router.close()
        dealer.close()
        assert router.send(identity, call(1)) is SendResult.GONE
        assert dealer.send(Beat(2)) is SendResult.GONE
        assert router.statistics().received == 1
        router.close()

    run(main())


# ---------------------------------------------------------------------------------------------- what is not taken


def test_malformed_messages_are_counted_logged_once_and_passed_over(
    run: Run, context: Context, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        raw = context.socket(zmq.DEALER)
        raw.connect(router.endpoint)
        for frames in ([b"\xc1"], [b""], [b"\x91\xcc\xc8"], [b"\xdd\xff\xff\xff\xff"]):
            raw.send_multipart(frames)
        raw.send_multipart([*IN.encode(Beat(1)), b"surplus"])
        raw.send_multipart([b"x"] * 65)
        raw.send_multipart(IN.encode(Beat(2)))
        assert (await router.recv())[1] == Beat(2)
        counted = router.statistics()
        assert (counted.malformed, counted.misframed, counted.dropped, counted.received) == (4, 2, 6, 1)
        raw.close(0)
        router.close()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert len([r for r in caplog.records if "dropped a message" in r.message]) == 1


def test_frames_over_the_codecs_limit_are_counted(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        small: Codec[Any] = Codec(FromWorkerSide, max_frame_bytes=1000)
        router = Router(context, endpoint, small)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(StepDone(1, 1, 0, 1, np.zeros(2000, dtype=np.int32), np.zeros(0, dtype=np.int32)))
        dealer.send(Beat(1))
        assert (await router.recv())[1] == Beat(1)
        assert router.statistics().oversized == 1
        dealer.close()
        router.close()

    run(main())


def test_a_frame_over_the_sockets_limit_ends_that_connection_only(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN, max_frame_bytes=100_000)
        other = Dealer(context, router.endpoint, OUT)
        other.send(Beat(1))
        identity, _ = await router.recv()
        raw = context.socket(zmq.DEALER)
        raw.connect(router.endpoint)
        raw.send(b"x" * 100_001)
        await eventually(lambda: router.statistics().disconnected >= 1)
        raw.close(0)
        assert router.send(identity, call(1)) is SendResult.SENT
        assert await other.recv() == call(1)
        assert router.statistics().received == 1
        assert not other.lost
        other.close()
        router.close()

    run(main())


def test_connections_that_speak_something_else_are_nobody(run: Run, context: Context) -> None:
    async def main() -> None:
        router = Router(context, "tcp://127.0.0.1:0", IN)
        host, port = router.endpoint.removeprefix("tcp://").split(":")
        for junk in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 100, b"\xff" * 64, b"\x00" * 64, b""):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(junk)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        assert (await router.recv())[1] == Beat(1)
        assert router.statistics().received == 1
        dealer.close()
        router.close()

    run(main())


def test_log_lines_about_peers_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    counter = transport.Counter("ipc:///x")
    with caplog.at_level(logging.WARNING):
        for peer in range(1000):
            counter.drop(peer.to_bytes(2, "big"), IN_ERROR)
    assert len(caplog.records) == transport.MAX_LOGGED_PEERS
    assert "only counted" in caplog.records[-1].message
    assert counter.snapshot().malformed == 1000


IN_ERROR = DecodeError("malformed", "no message")


# ------------------------------------------------------------------------------------------------------ the end


def test_a_lost_connection_gives_what_arrived_and_then_ends(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        identity, _ = await router.recv()
        router.send(identity, call(1))
        router.send(identity, Shutdown(1, "bye"))
        router.close(1.0)
        await eventually(lambda: dealer.lost)
        assert [await dealer.recv(), await dealer.recv()] == [call(1), Shutdown(1, "bye")]
        with pytest.raises(EngineClosed, match="lost"):
            await dealer.recv()
        assert dealer.send(Beat(2)) is SendResult.GONE
        dealer.close()

    run(main())


def test_a_receiver_that_waits_learns_of_the_loss(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        await router.recv()
        waiting = asyncio.create_task(dealer.recv())
        await asyncio.sleep(0)
        router.close()
        with pytest.raises(EngineClosed, match="lost"):
            await waiting
        dealer.close()

    run(main())


def test_close_ends_a_receiver_that_waits(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        waiting = asyncio.create_task(router.recv())
        await asyncio.sleep(0)
        router.close()
        with pytest.raises(EngineClosed, match="is closed"):
            await waiting
        with pytest.raises(EngineClosed, match="is closed"):
            await router.recv()

    run(main())


def test_a_cancelled_receiver_loses_nothing(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.recv(), 0.01)
        dealer = Dealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        assert (await router.recv())[1] == Beat(1)
        dealer.close()
        router.close()

    run(main())


def test_a_second_receiver_is_an_error(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        first = asyncio.create_task(router.recv())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await router.recv()
        router.close()
        with pytest.raises(EngineClosed):
            await first

    run(main())


# ---------------------------------------------------------------------------------------------------- from a thread


def test_a_thread_waits_for_messages_and_other_descriptors(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = ThreadDealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        identity, _ = await router.recv()
        reading, writing = os.pipe()
        began = time.monotonic()
        assert await asyncio.to_thread(dealer.poll, [reading], 0.05) == set()
        assert time.monotonic() - began >= 0.04
        assert dealer.recv_nowait() is None

        router.send(identity, call(1))
        assert await asyncio.to_thread(dealer.poll, [reading], 10.0) == set()
        assert dealer.recv_nowait() == call(1)

        os.write(writing, b"x")
        assert await asyncio.to_thread(dealer.poll, [reading], 10.0) == {reading}
        os.read(reading, 1)
        os.close(writing)
        assert await asyncio.to_thread(dealer.poll, [reading], 10.0) == {reading}
        os.close(reading)
        assert dealer.poll() == set()
        dealer.close()
        router.close()

    run(main())


def test_a_thread_learns_of_the_loss(run: Run, context: Context, endpoint: str) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        dealer = ThreadDealer(context, router.endpoint, OUT)
        dealer.send(Beat(1))
        identity, _ = await router.recv()
        router.send(identity, Shutdown(1))
        router.close(1.0)
        while not dealer.lost:
            dealer.poll(timeout_s=0.05)
        assert dealer.recv_nowait() == Shutdown(1)
        with pytest.raises(EngineClosed, match="lost"):
            dealer.recv_nowait()
        assert dealer.send(Beat(2)) is SendResult.GONE
        assert dealer.statistics().gone == 1
        dealer.close()
        with pytest.raises(EngineClosed, match="closed"):
            dealer.recv_nowait()

    run(main())


def test_another_process_learns_that_the_router_is_gone(
    run: Run, context: Context, endpoint: str, start_peer: StartPeer
) -> None:
    async def main() -> None:
        router = Router(context, endpoint, IN)
        process = start_peer(router.endpoint)
        await router.recv()
        router.close()
        output, _ = await asyncio.to_thread(process.communicate, timeout=10)
        assert "is lost" in output
        assert process.returncode == 0

    run(main())
