"""Garbage on the wire: random, truncated and mutated frames at both ROUTERs while requests run.

Half of the client side's garbage comes from connections that have said a proper Hello, so that what still decodes after
a mutation reaches the core.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from drumline.engine.client import AsyncEngine
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Beat,
    BeatClient,
    BeatWorker,
    CallRanks,
    CallResult,
    Cancel,
    Exited,
    Fault,
    FromClient,
    FromWorkerSide,
    Goodbye,
    HelloClient,
    HelloSupervisor,
    HelloWorker,
    LogprobEntry,
    Message,
    Ready,
    Resume,
    SamplingSpec,
    Spawned,
    StatusQuery,
    StepDone,
    Stop,
    Stopping,
    StoreReady,
    Submit,
)
from drumline.protocol.status import EngineStatus
from tests.integration.engine.processes import running
from tests.integration.engine.test_life import TWO
from tests.procfs import rss_bytes

FRAMES = 20_000
PEERS = 8
BATCH = 100
REQUESTS = 8
MIB = 1 << 20

INTS = np.arange(600, dtype=np.int32)
ENTRY = LogprobEntry(1, -0.5, 1, INTS[:2], np.zeros(2, dtype=np.float32))
CLIENT_MESSAGES: list[Message] = [
    HelloClient(PROTOCOL_VERSION, "fuzz"),
    Submit(1, "fuzzed", INTS[:20], SamplingSpec(seed=1, stop_token_ids=(1, 2)), 2),
    Submit(2, "fuzzed long", INTS, SamplingSpec(logprobs=2, min_tokens=1), 2, n=2, seed_given=True),
    Stop("fuzzed", 0, 3),
    Cancel(3, "fuzzed"),
    Ack(5),
    Resume(4, "fuzzed", (0, 1)),
    StatusQuery(5),
    CallRanks(6, "ping", b"x", 1.0),
    BeatClient("fuzz"),
    Goodbye("fuzz"),
]
WORKER_MESSAGES: list[Message] = [
    HelloWorker(PROTOCOL_VERSION, "guess", 0, "inc", 1, "h"),
    StoreReady(1, 1, 0, "127.0.0.1", 1),
    Ready(1, 1, 0, "digest", 10, 10, 10, 0.1),
    StepDone(1, 1, 0, 3, INTS, INTS[:1], (ENTRY,)),
    Fault(1, 1, 1, ErrorInfo(kind="internal", text="no")),
    CallResult(1, 1, 1, 0, True, b"x"),
    BeatWorker(1, 1, 0, 1, 1, False),
    HelloSupervisor(PROTOCOL_VERSION, "guess", 1),
    Exited(0, 1, 0, 9, "gone"),
    Spawned(0, 1),
    Stopping("now"),
    Beat(1),
]


class Garbage:
    """An endless, repeatable stream of messages as frames: random, truncated, mutated, and a few that are whole."""

    def __init__(self, messages: list[Message], union: Any, seed: int) -> None:
        codec: Codec[Any] = Codec(union)
        self._valid = [[bytes(frame) for frame in codec.encode(message)] for message in messages]
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[list[bytes]]:
        while True:
            kind = self._random.randrange(20)
            frames = list(self._random.choice(self._valid))
            if kind < 6:
                yield [self._random.randbytes(self._random.randrange(200)) for _ in range(self._random.randrange(1, 5))]
            elif kind < 11:
                place = self._random.randrange(len(frames))
                frames[place] = frames[place][: self._random.randrange(len(frames[place]) + 1)]
                yield frames[: self._random.randrange(1, len(frames) + 1)]
            elif kind < 18:
                yield [self._mutated(frame) for frame in frames]
            elif kind < 19:
                # Lengths that promise gigabytes, and nesting without end.
                yield [self._random.choice([b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x91" * 5000])]
            else:
                yield frames

    def _mutated(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self._random.randrange(1, 4)):
            if changed:
                changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        return bytes(changed)


@contextmanager
def peers(endpoint: str, hello: list[bytes] | None) -> Iterator[list[zmq.Socket[bytes]]]:
    """Raw sockets at ``endpoint``; every second one says ``hello`` first."""
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(PEERS)]
    try:
        for number, one in enumerate(sockets):
            one.setsockopt(zmq.SNDTIMEO, 10_000)
            one.connect(endpoint)
            if hello is not None and number % 2:
                one.send_multipart(hello)
        yield sockets
    finally:
        for one in sockets:
            one.close(linger=0)
        context.term()


def spray(sockets: list[zmq.Socket[bytes]], stream: Iterator[list[bytes]]) -> None:
    """One batch, shared out over the peers; what they are answered is thrown away."""
    for number in range(BATCH):
        sockets[number % PEERS].send_multipart(next(stream))
    for one in sockets:
        while one.poll(0):
            one.recv_multipart()


async def fuzz(endpoint: str, garbage: Garbage, hello: list[bytes] | None, frames: int) -> None:
    with peers(endpoint, hello) as sockets:
        stream = iter(garbage)
        for _ in range(frames // BATCH):
            spray(sockets, stream)
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)


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
async def test_requests_finish_unharmed_and_memory_stays_flat(mark: str, side: str) -> None:
    async with running(TWO) as engine:
        undisturbed = await asyncio.gather(*(read_all(engine, number, -1) for number in range(REQUESTS)))
        local = engine._local
        assert local is not None
        endpoint = f"ipc://{local.runtime_dir}/{side}.sock"
        union = FromClient if side == "client" else FromWorkerSide
        codec: Codec[Any] = Codec(union)
        hello = [bytes(frame) for frame in codec.encode(CLIENT_MESSAGES[0])] if side == "client" else None
        messages = CLIENT_MESSAGES if side == "client" else WORKER_MESSAGES
        before = seen(await engine.status(), side)

        over = asyncio.Event()
        requests = [asyncio.create_task(read_until(engine, number, over)) for number in range(REQUESTS)]
        await fuzz(endpoint, Garbage(messages, union, seed=1), hello, FRAMES // 4)
        status = await counted(engine, side, before + FRAMES // 4)
        pid = status.coordinator.pid
        warm = rss_bytes(pid)
        await fuzz(endpoint, Garbage(messages, union, seed=2), hello, FRAMES - FRAMES // 4)
        status = await counted(engine, side, before + FRAMES)
        assert rss_bytes(pid) - warm < 24 * MIB
        over.set()
        for turns, expected in zip(await asyncio.gather(*requests), undisturbed, strict=True):
            assert all(tokens == expected for tokens in turns)

        assert status.state == "ready"
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
