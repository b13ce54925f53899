"""Garbage on the wire at both ROUTERs while requests run and a rank is killed.

Half of the client side's garbage comes from connections that have said a proper Hello, so that what still decodes after
a mutation reaches the core.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.codec import Codec
from drumline.protocol.messages import FromClient, FromWorkerSide
from drumline.protocol.status import EngineStatus
from tests.faults.hostile import CLIENT_MESSAGES, WORKER_MESSAGES, Garbage, forged, fuzz, peers
from tests.integration.engine.processes import running
from tests.integration.engine.recovery import whole
from tests.integration.engine.test_life import TWO
from tests.procfs import is_alive, rss_bytes

FRAMES = 20_000
REQUESTS = 8
MIB = 1 << 20


async def read_all(engine: AsyncEngine, number: int, turn: int = 0) -> list[int]:
    params = SamplingParams(max_tokens=300, temperature=0.8, seed=number, ignore_eos=True)
    tokens: list[int] = []
    async for output in engine.generate(f"Test number {number}", params, request_id=f"mine-{number}-{turn}"):
        tokens = list(output.token_ids)
    return tokens


async def read_until(engine: AsyncEngine, number: int, over: asyncio.Event) -> list[list[int]]:
    """The same request again and again, so that one runs at any moment until ``over``."""
    turns: list[list[int]] = []
    while not (turns and over.is_set()):
        turns.append(await read_all(engine, number, len(turns)))
    return turns


def seen(status: EngineStatus, side: str) -> int:
    counters = status.counters
    return counters[f"{side}_frames_received"] + counters[f"{side}_frames_dropped"]


async def status_when(engine: AsyncEngine, condition: Callable[[EngineStatus], bool]) -> EngineStatus:
    """The first status that fulfils ``condition``."""
    async with asyncio.timeout(30.0):
        status: EngineStatus = await engine.status()
        while not condition(status):
            await asyncio.sleep(0.05)
            status = await engine.status()
    return status


async def counted(engine: AsyncEngine, side: str, least: int) -> EngineStatus:
    """The status, once ``least`` messages have been read on ``side``."""
    return await status_when(engine, lambda status: seen(status, side) >= least)


async def counted_drop(engine: AsyncEngine, counter: str) -> EngineStatus:
    """The status, once ``counter`` is not 0."""
    return await status_when(engine, lambda status: status.counters[counter] > 0)


@pytest.mark.parametrize("side", ["client", "worker"])
async def test_requests_and_a_recovery_go_on_unharmed_and_memory_stays_flat(mark: str, side: str) -> None:
    async with running(TWO) as engine:
        undisturbed = await asyncio.gather(*(read_all(engine, number, -1) for number in range(REQUESTS)))
        local = engine._local
        assert local is not None
        endpoint = f"ipc://{local.runtime_dir}/{side}.sock"
        union = FromClient if side == "client" else FromWorkerSide
        codec: Codec[Any] = Codec(union)
        hello = [bytes(frame) for frame in codec.encode(CLIENT_MESSAGES[0])] if side == "client" else None
        start = await whole(engine)
        messages = CLIENT_MESSAGES if side == "client" else WORKER_MESSAGES + forged(start)
        before = seen(start, side)

        over = asyncio.Event()
        requests = [asyncio.create_task(read_until(engine, number, over)) for number in range(REQUESTS)]
        await fuzz(endpoint, Garbage(messages, union, seed=1), hello, FRAMES // 4)
        status = await counted(engine, side, before + FRAMES // 4)
        pid = status.coordinator.pid
        warm = rss_bytes(pid)
        os.kill(start.ranks[1].pid, signal.SIGKILL)
        await fuzz(endpoint, Garbage(messages, union, seed=2), hello, FRAMES - FRAMES // 4)
        status = await counted(engine, side, before + FRAMES)
        assert rss_bytes(pid) - warm < 24 * MIB
        over.set()
        for turns, expected in zip(await asyncio.gather(*requests), undisturbed, strict=True):
            assert all(tokens == expected for tokens in turns)

        end = await whole(engine)
        assert end.ranks[0].pid == start.ranks[0].pid
        assert [rank.restarts for rank in end.ranks] == [0, 1]
        assert not is_alive(start.ranks[1].pid)
        assert [(fault.kind, fault.rank) for fault in end.faults] == [("exit", 1)]
        assert status.counters[f"{side}_frames_dropped"] > FRAMES // 2
        assert status.counters[f"{side}_frames_malformed"] > FRAMES // 4
        if side == "worker":
            assert status.counters["worker_messages_wrong_token"] > 0
            assert status.counters["worker_messages_unknown_peer"] > 0
        else:
            assert status.counters["client_messages_unknown_peer"] > 0
        assert len(await read_all(engine, 99)) == 300


async def test_peers_that_speak_no_zmtp_are_refused_and_oversized_frames_end_their_connection(
    mark: str,
) -> None:
    async with running(TWO) as engine:
        local = engine._local
        assert local is not None
        for side in ("client", "worker"):
            path = f"{local.runtime_dir}/{side}.sock"
            for payload in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 4096, b"\xff" + b"\0" * 8 + b"\x7f"):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                    raw.connect(path)
                    raw.sendall(payload)
            with peers(f"ipc://{path}", None) as sockets:
                sockets[0].send(bytes(80 * MIB))
                sockets[1].send_multipart([b"x"] * 500)
                await counted_drop(engine, f"{side}_frames_misframed")
                await counted_drop(engine, f"{side}_frames_disconnected")
            await counted_drop(engine, f"{side}_frames_refused")
        assert len(await read_all(engine, 1)) == 300
