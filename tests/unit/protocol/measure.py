"""What the wire costs, in microseconds: ``python -m tests.unit.protocol.measure``. Asserts nothing.

The codec's figures are the best of many short runs. The round trip (a decode-step plan out, 256 tokens back, between
two processes over ipc) stands beside a bare pyzmq ping-pong of the same bytes, taken in turns on the same machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import numpy as np
import uvloop
import zmq
import zmq.asyncio

from drumline.protocol.codec import Codec
from drumline.protocol.messages import Admit, Beat, FromWorkerSide, SamplingSpec, Shutdown, Step, StepDone, ToWorker
from drumline.protocol.sockets import Router, ThreadDealer

OUT: Codec[Any] = Codec(ToWorker)
IN: Codec[Any] = Codec(FromWorkerSide)
NONE = np.zeros(0, dtype=np.int32)
COUNTS = np.array([256, 256], dtype=np.int32)
ROWS = np.arange(16, dtype=np.int32)
PLAN = Step(1, 1, 1, 12345, COUNTS, NONE, (), ROWS, ROWS, NONE, NONE)
DONE = StepDone(1, 1, 0, 12345, np.arange(256, dtype=np.int32), NONE)
ROUNDS = 5000


def admissions() -> Step:
    rows = np.arange(64, dtype=np.int32)
    prompt, blocks = np.arange(128, dtype=np.int32), np.arange(8, dtype=np.int32)
    admitted = tuple(Admit(row, prompt, 128, 0, blocks, SamplingSpec()) for row in range(64))
    return Step(1, 1, 1, 12345, COUNTS, NONE, admitted, ROWS, ROWS, rows, rows)


def codec_costs() -> None:
    large = StepDone(1, 1, 0, 12345, np.arange(1024, dtype=np.int32), NONE)
    cases: list[tuple[str, Codec[Any], Step | StepDone]] = [
        ("decode-step plan", OUT, PLAN),
        ("64 admissions", OUT, admissions()),
        ("256 tokens", IN, DONE),
        ("1,024 tokens", IN, large),
    ]
    for name, codec, message in cases:
        frames = codec.encode(message)
        size = "+".join(str(len(frame)) for frame in frames)
        encode, decode = best(lambda: codec.encode(message)), best(lambda: codec.decode(frames))  # noqa: B023
        print(f"{name:20} {size:>12} bytes   encode {encode:7.2f} us   decode {decode:7.2f} us")


def best(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=200, repeat=200)) / 200 * 1e6


async def ask_bare(endpoint: str) -> list[float]:
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(endpoint)
    identity, _ = await router.recv_multipart()
    plan, costs = msgspec.msgpack.encode(bytes(160)), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await router.send_multipart([identity, plan])
        msgspec.msgpack.decode((await router.recv_multipart())[1])
        costs.append(time.perf_counter() - began)
    await router.send_multipart([identity, b""])
    router.close()
    context.term()
    return costs


def answer_bare(endpoint: str) -> None:
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(endpoint)
    dealer.send(b"hello")
    reply = msgspec.msgpack.encode(bytes(1050))
    while plan := dealer.recv():
        msgspec.msgpack.decode(plan)
        dealer.send(reply)


async def ask(endpoint: str) -> list[float]:
    context: zmq.Context[Any] = zmq.Context()
    router = Router(context, endpoint, IN)
    identity, _ = await router.recv()
    costs = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        router.send(identity, PLAN)
        await router.recv()
        costs.append(time.perf_counter() - began)
    router.send(identity, Shutdown(1))
    router.close(1.0)
    context.term()
    return costs


def answer(endpoint: str) -> None:
    dealer = ThreadDealer(zmq.Context(), endpoint, OUT)
    dealer.send(Beat(os.getpid()))
    while True:
        dealer.poll(timeout_s=10)
        message = dealer.recv_nowait()
        if isinstance(message, Shutdown):
            return
        if message is not None:
            dealer.send(DONE)


def round_trips() -> None:
    askers: dict[str, Callable[[str], Coroutine[Any, Any, list[float]]]] = {"bare": ask_bare, "drumline": ask}
    with tempfile.TemporaryDirectory(prefix="dl") as folder:
        for turn in range(3):
            for kind, asker in askers.items():
                endpoint = f"ipc://{folder}/{kind}{turn}"
                command = [sys.executable, "-m", "tests.unit.protocol.measure", kind, endpoint]
                with subprocess.Popen(command) as peer:
                    costs = np.array(uvloop.run(asker(endpoint))[500:]) * 1e6
                    peer.wait(30)
                p10, p50, p99 = np.percentile(costs, (10, 50, 99))
                print(f"round trip {kind:9} p10 {p10:7.1f} us   median {p50:7.1f} us   p99 {p99:7.1f} us")


def main() -> None:
    if len(sys.argv) == 3:
        kind, endpoint = sys.argv[1:]
        {"bare": answer_bare, "drumline": answer}[kind](endpoint)
        os._exit(0)
    print(
        f"python {sys.version.split()[0]}, pyzmq {zmq.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()}"
    )
    codec_costs()
    round_trips()


if __name__ == "__main__":
    main()
