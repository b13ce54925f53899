"""Garbage on the wire: random, truncated, mutated and forged frames, from peers that nobody asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zmq

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
    Goodbye,
    HelloClient,
    HelloSupervisor,
    HelloWorker,
    Injected,
    InjectFaults,
    Injection,
    LayoutQuery,
    Left,
    Loaded,
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

PEERS = 8
BATCH = 100

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
    LayoutQuery(7),
    InjectFaults(8, (Injection(1, 0, "kill"),)),
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
    Loaded(1, 0, "digest", 10, 10, 10, 0.1, "cpu"),
    Left(1, 2, 0, INTS.reshape(2, 300), 10),
    Injected(1, 0, "inc", 1),
    Beat(1),
]


def forged(status: EngineStatus) -> list[Message]:
    """What the ranks of an engine could say now, or could have said in an epoch that is over."""
    messages: list[Message] = []
    for rank in status.ranks:
        newest = next(group.epoch for group in status.groups if rank.dp_rank in group.replicas)
        for epoch in (newest, newest - 1):
            messages += [
                StepDone(status.term, epoch, rank.rank, rank.step, INTS[:8], INTS[:0]),
                Fault(status.term, epoch, rank.rank, ErrorInfo(kind="internal", text="no")),
                Left(status.term, epoch, rank.rank, INTS[:0].reshape(0, 0), 10),
                BeatWorker(status.term, epoch, rank.rank, rank.step, 1, True),
            ]
        messages.append(HelloWorker(PROTOCOL_VERSION, "", rank.rank, rank.incarnation, rank.pid, rank.host))
        messages.append(Exited(rank.rank, rank.pid, 0, 9, "gone"))
    return messages


class Garbage:
    """An endless, repeatable stream of messages as frames: random, truncated, mutated, and a few that are whole."""

    def __init__(self, messages: Sequence[Message], union: Any, seed: int) -> None:
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
