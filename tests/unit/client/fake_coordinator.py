"""A coordinator that does what a test tells it, behind a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pytest
import zmq

from drumline.engine import client
from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.engine.outputs import RequestOutput
from drumline.engine.presence import Timing
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    I32,
    PROTOCOL_VERSION,
    Accepted,
    Finished,
    FromClient,
    HelloClient,
    LogprobEntry,
    ModelInfo,
    Resume,
    Resumed,
    StreamEnd,
    Submit,
    ToClient,
    Tokens,
    WelcomeClient,
)
from drumline.protocol.sockets import Router
from tests.unit.client.tokenizers_for_tests import byte_tokenizer

M = TypeVar("M")
ANSWER_WITHIN_S = 5.0


def i32(*values: int) -> I32:
    return np.array(values, dtype=np.int32)


class FakeCoordinator:
    """Takes messages off the wire in order; ``expect`` waits for the next one of a type and keeps the others."""

    def __init__(self, endpoint: str, term: int = 1, knows_all: bool = True) -> None:
        self.endpoint = endpoint
        self.term = term
        self.knows_all = knows_all
        self.failed: asyncio.Future[ErrorInfo] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.received: list[FromClient] = []
        self.successors: list[FakeCoordinator] = []
        self.frame = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router: Router[FromClient] = Router(self._context, endpoint, Codec(FromClient))
        self._peer = b""
        self._handles = 0
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            self._peer, message = await self._router.recv()
            self.received.append(message)
            self._arrived.set()

    async def expect(self, kind: type[M]) -> M:
        """The oldest message of ``kind`` that was not expected before."""
        async with asyncio.timeout(ANSWER_WITHIN_S):
            while True:
                for message in self.received:
                    if isinstance(message, kind):
                        self.received.remove(message)
                        return message
                self._arrived.clear()
                await self._arrived.wait()

    def send(self, message: ToClient) -> None:
        self._router.send(self._peer, message)

    async def welcome(self, tokenizer: bytes | None = None, version: int = PROTOCOL_VERSION) -> HelloClient:
        hello = await self.expect(HelloClient)
        content = byte_tokenizer().to_str().encode() if tokenizer is None else tokenizer
        info = ModelInfo("m", "m", 257, 1000, (256,), 2, 999, has_tokenizer=bool(content))
        self.send(WelcomeClient(version, self.term, "digest", info, content, self.knows_all))
        return hello

    def handles(self, n: int) -> list[int]:
        """Stream handles that were not used before."""
        self._handles += n
        return list(range(self._handles - n, self._handles))

    async def accept(self) -> tuple[Submit, list[int]]:
        """Accepts the next Submit; returns it with its stream handles."""
        submit = await self.expect(Submit)
        handles = self.handles(submit.n)
        self.send(Accepted(submit.call_id, submit.request_id, i32(*handles), 1, num_cached_tokens=0))
        return submit, handles

    async def resume(
        self, submit: Submit, ids: Sequence[Sequence[int]], ends: tuple[StreamEnd, ...] = ()
    ) -> tuple[Resume, list[int]]:
        """Answers the next Resume: ``ids`` by index have been generated. Returns it with the new handles."""
        resume = await self.expect(Resume)
        handles = self.handles(submit.n)
        tokens = tuple(i32(*one) for one in ids)
        self.send(
            Resumed(
                resume.call_id,
                submit.request_id,
                submit.prompt,
                i32(*handles),
                tokens,
                ends,
                client_params=submit.client_params,
                seed=1,
                max_tokens=submit.max_tokens,
            )
        )
        return resume, handles

    def tokens(self, handle: int, position: int, ids: Sequence[int], logprobs: tuple[LogprobEntry, ...] = ()) -> None:
        """One frame with consecutive tokens of one stream."""
        self.frame += 1
        count = len(ids)
        places = i32(*range(position, position + count))
        index = i32(*range(len(logprobs)))
        self.send(Tokens(self.frame, i32(*[handle] * count), places, i32(*ids), index, logprobs))

    def finish(
        self, submit: Submit, handle: int, num_tokens: int, *, index: int = 0, reason: str = "length", stop: int = -1
    ) -> None:
        self.frame += 1
        self.send(Finished(self.frame, (StreamEnd(handle, submit.request_id, index, reason, stop, num_tokens),)))

    @property
    def client_endpoint(self) -> str:
        return self.endpoint

    def vanish(self) -> None:
        """The socket is gone, as when the process is killed."""
        self._task.cancel()
        self._router.close(0.0)

    async def succeeded(self, term: int, knows_all: bool = True) -> FakeCoordinator:
        """Another coordinator takes the place of this one, and has said welcome."""
        self.vanish()
        other = FakeCoordinator(self.endpoint, term, knows_all)
        other._handles = self._handles + 100
        self.successors.append(other)
        await other.welcome()
        return other

    async def close(self, timeout: float = 1.0) -> None:
        self.closed = True
        for other in self.successors:
            await other.close(timeout)
        self.vanish()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.term()


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, tokenizer: bytes | None = None, timing: Timing | None = None
) -> AsyncIterator[tuple[AsyncEngine, FakeCoordinator]]:
    """An AsyncEngine that is connected to a fake coordinator and ready."""
    fake = FakeCoordinator(f"ipc://{folder}/client.sock")

    async def start_local(config: EngineConfig, on_event: object) -> FakeCoordinator:
        return fake

    monkeypatch.setattr(client, "start_local", start_local)
    engine = AsyncEngine(EngineConfig(model="demo"))
    if timing is not None:
        engine._timing = timing
    start = asyncio.create_task(engine.start())
    await fake.welcome(tokenizer)
    await start
    try:
        yield engine, fake
    finally:
        await engine.close()


Served: TypeAlias = tuple[AsyncEngine, FakeCoordinator]


async def read(engine: AsyncEngine, prompt: Any = "hi", params: SamplingParams | None = None, **options: Any) -> Any:
    """A task that collects all outputs of one request."""

    async def collect() -> list[RequestOutput]:
        return [out async for out in engine.generate(prompt, params, **options)]

    return asyncio.create_task(collect())


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(ANSWER_WITHIN_S):
        return await awaitable
