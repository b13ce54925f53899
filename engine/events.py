"""The events of an engine, for whoever iterates over them."""

from __future__ import annotations

import asyncio
import collections
import weakref
from collections.abc import AsyncIterator

from drumline.protocol.messages import Event

ROOM = 1024


class EventStream(AsyncIterator[Event]):
    """Iterates over events as they come, until the engine closes. At most 1,024 wait for their reader; of more than
    that the oldest are dropped, and counted in ``dropped``."""

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: collections.deque[Event] = collections.deque()
        self._ended = False
        self._changed = asyncio.Event()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()

    def push(self, event: Event) -> None:
        """One more event."""
        if len(self._waiting) == ROOM:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(event)
        self._changed.set()

    def end(self) -> None:
        """There will be no more; those that wait can still be read."""
        self._ended = True
        self._changed.set()


class EventStreams:
    """All iterators over the events of one engine. One that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._ended = False

    def open(self) -> EventStream:
        """An iterator over what comes from now on."""
        stream = EventStream()
        if self._ended:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    def tell(self, event: Event) -> None:
        """Give ``event`` to every iterator."""
        for stream in list(self._streams):
            stream.push(event)

    def end(self) -> None:
        """The engine is closed."""
        self._ended = True
        for stream in list(self._streams):
            stream.end()
