"""The iterator that :meth:`AsyncEngine.generate` returns."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Awaitable, Callable

from drumline.engine.outputs import RequestOutput
from drumline.engine.streams import RequestStream
from drumline.protocol.errors import RequestFailed, from_info


class Generation(AsyncIterator[RequestOutput]):
    """Iterates over the outputs of one request.

    The request is submitted when iteration begins. Leaving before the end cancels it at once: by ``break`` (the
    iterator is dropped), by ``aclose()``, or by the cancellation of the task that iterates. A class rather than an
    async generator, because a generator that is left is closed by the event loop some time later.
    """

    def __init__(
        self, open_stream: Callable[[], Awaitable[RequestStream]], leave: Callable[[RequestStream], None]
    ) -> None:
        self._open_stream = open_stream
        self._leave = leave
        self._stream: RequestStream | None = None
        self._reader = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: collections.deque[RequestOutput] = collections.deque()
        self._ended = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._stream is None:
                self._loop = asyncio.get_running_loop()
                self._stream = await self._open_stream()
                self._reader = self._stream.reader
            output = await self._next(self._stream)
        except BaseException:
            self._close()
            raise
        if output is None:
            self._close()
            raise StopAsyncIteration
        return output

    async def _next(self, stream: RequestStream) -> RequestOutput | None:
        """Waits without a deadline: the connection fails the stream when the engine is gone."""
        while not self._news:
            if stream.reader != self._reader:
                raise RequestFailed(f"request {stream.request_id!r} has a newer reader")
            stream.changed.clear()
            self._news.extend(stream.take())
            if self._news:
                break
            if stream.error is not None:
                raise from_info(stream.error)
            if stream.finished:
                return None
            await stream.changed.wait()
        return self._news.popleft()

    async def aclose(self) -> None:
        """Ends the iteration; a request that still runs is cancelled. Does not wait for the confirmation."""
        self._close()

    def _close(self) -> None:
        self._ended = True
        stream, self._stream = self._stream, None
        if stream is not None and stream.reader == self._reader:
            self._leave(stream)

    def __del__(self) -> None:
        # The collector may run in any thread; the connection belongs to its loop's.
        stream, loop = self._stream, self._loop
        if stream is not None and stream.reader == self._reader and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._leave, stream)
