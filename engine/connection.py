"""One connection of the client library to an engine: its calls, its requests, and how it notices an end.

Two tasks run while it is open. One reads: every message goes to the call that waits for it or to the inbox. One ticks:
acknowledges, and probes a silent coordinator. A coordinator that is lost, or mute, is not the end: another may take
over, and is told what it may not know; readers see one stream without a gap or a repeat. The end is the engine's own
failure, the death of either task, or that nobody has taken over for ``lease_s``: then every call and every request gets
a typed error and wakes up.

No beat is sent. That this process lives the coordinator sees by its connection; a beat from this loop would stop
whenever the app blocks its loop for a while, and its requests would be cancelled for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from drumline.engine.incoming import Incoming
from drumline.engine.presence import Presence, Timing, Verdict
from drumline.engine.reconnect import CoordinatorSocket
from drumline.engine.streams import RequestStream
from drumline.protocol.errors import EngineClosed, ErrorInfo, RequestFailed, from_info
from drumline.protocol.messages import (
    Cancel,
    Event,
    Failed,
    FaultsInjected,
    FromClient,
    Goodbye,
    InjectFaults,
    Injection,
    MessageFault,
    Resume,
    Resumed,
    StatusQuery,
    ToClient,
    WelcomeClient,
)

_CAUSE_GRACE_S = 1.0


class Connection:
    """Made in a running loop, used from that loop alone. ``cause`` is set by whoever watches the engine's processes
    when they have ended; it tells more than a lost connection does."""

    def __init__(
        self,
        endpoint: str,
        timing: Timing,
        on_event: Callable[[Event], None],
        cause: asyncio.Future[ErrorInfo] | None = None,
    ) -> None:
        self.client_id = uuid.uuid4().hex
        self.error: ErrorInfo | None = None
        self.timing = timing
        self._on_event = on_event
        self._incoming = Incoming()
        self._calls = self._incoming.calls
        self.inbox = self._incoming.inbox
        self._presence = Presence(timing)
        self._socket = CoordinatorSocket(endpoint, self.client_id)
        self.welcome: asyncio.Future[WelcomeClient] = asyncio.get_running_loop().create_future()
        self._tasks = [
            self._supervised(self._read(), "reading from the coordinator"),
            self._supervised(self._tick(), "watching the coordinator"),
        ]
        if cause is not None:
            self._tasks.append(self._supervised(self._watch(cause), "watching the processes"))

    # -- out

    @property
    def endpoint(self) -> str:
        """Where the coordinator is."""
        return self._socket.endpoint

    @property
    def term(self) -> int:
        """The term of the coordinator that said welcome last."""
        return self._socket.term

    def post(self, message: FromClient) -> None:
        """Sends ``message``, or keeps it until the socket takes it again. What is kept is bounded by live requests.

        Nothing is sent while there is no coordinator: the next one is told all that matters.
        """
        if self.error is not None:
            return
        if isinstance(message, Cancel):
            self._incoming.cancelling(message)
        if self._socket.up:
            self._calls.sent(message, time.monotonic())
            self._socket.send(message)

    def _post_all(self, messages: Sequence[FromClient]) -> None:
        for message in messages:
            self.post(message)

    async def call(self, make: Callable[[int], FromClient], what: str, timeout: float | None = None) -> Any:
        """Sends what ``make`` makes of a call id and returns the answer. Raises the error that is the answer,
        :class:`RequestFailed` when none comes in time, :class:`EngineClosed` when the connection ends meanwhile."""
        self.check_open()
        limit = self.timing.answer_s if timeout is None else timeout
        call_id, call = self._calls.open(make)
        started = time.monotonic()
        outages = self._presence.outages_s(started)
        try:
            self.post(call.message)
            left = limit
            while left > 0.0 and not call.answer.done():
                await asyncio.wait([call.answer], timeout=left)
                now = time.monotonic()
                left = limit - (now - started) + (self._presence.outages_s(now) - outages)
            if not call.answer.done():
                raise RequestFailed(f"the coordinator did not answer to {what} within {limit:g} s")
            return call.answer.result()
        finally:
            self._calls.close(call_id)

    def cancel_quietly(self, request_id: str) -> None:
        """Cancels without waiting; the inbox frees the id when the engine confirms."""
        self.post(Cancel(self._calls.next_id(), request_id))

    async def attach(
        self, request_id: str, positions: Sequence[int], make: Callable[[Resumed], RequestStream]
    ) -> RequestStream:
        """Takes over a request that another connection submitted, or one before this; its reader there ends. ``make``
        makes its stream, at once, since its tokens follow. Raises ``InvalidRequest`` for an id that is not known."""

        def message(call_id: int) -> Resume:
            self._incoming.attaching[call_id] = make
            return Resume(call_id, request_id, tuple(positions))

        stream: RequestStream = await self.call(message, f"resume {request_id!r}")
        return stream

    async def inject_faults(
        self,
        injections: Sequence[Injection] = (),
        messages: Sequence[MessageFault] = (),
        *,
        clear: bool = False,
        full_disk: int = -1,
    ) -> None:
        """Brings faults upon the engine, see :class:`~drumline.protocol.messages.InjectFaults`. Raises the typed error
        with which they were refused."""
        answer: FaultsInjected = await self.call(
            lambda call_id: InjectFaults(call_id, tuple(injections), tuple(messages), clear, full_disk), "inject faults"
        )
        if answer.error is not None:
            raise from_info(answer.error)

    # -- in

    async def _read(self) -> None:
        while self.error is None:
            try:
                message = await self._socket.recv()
            except EngineClosed as lost:
                self._disconnected(lost.text)
                await self._socket.reconnect()
                continue
            self._presence.heard()
            self._socket.flush()
            self._take(message)

    def _take(self, message: ToClient) -> None:
        now = time.monotonic()
        if isinstance(message, Event):
            self._on_event(message)
        elif isinstance(message, WelcomeClient):
            self._welcomed(message, now)
        elif isinstance(message, Failed) and not message.request_id:
            self.fail(message.error)
        else:
            self._post_all(self._incoming.take(message, now))

    # -- coordinators come and go

    def _disconnected(self, text: str) -> None:
        now = time.monotonic()
        self.inbox.disconnected(now)
        if self.welcome.done() and self.error is None and self._presence.lost(now):
            self._on_event(Event("warning", f"{text}; waiting for another coordinator", term=self.term))

    def _welcomed(self, message: WelcomeClient, now: float) -> None:
        before = self.term
        if self._socket.up or not self._socket.welcomed(message):
            return
        if not self.welcome.done():
            self.welcome.set_result(message)
            return
        if message.info != self.welcome.result().info:
            self.fail(EngineClosed(f"another engine has taken the place of this one: it serves {message.info}").info)
            return
        outage = self._presence.back(now)
        for answer in self._incoming.come_back(now, message.term, message.knows_all):
            self._calls.sent(answer, now)
            self._socket.send(answer)
        whose = "another coordinator has taken over" if message.term > before else "the coordinator is there again"
        text = f"{whose} (term {message.term}), after {outage:.2f} s"
        self._on_event(Event("term", text, seconds=outage, term=message.term))

    async def _watch(self, cause: asyncio.Future[ErrorInfo]) -> None:
        found = await asyncio.shield(cause)
        # What the coordinator said itself before it ended tells more still.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CAUSE_GRACE_S):
                await self._socket.lost.wait()
        self.fail(found)

    async def _tick(self) -> None:
        socket, timing = self._socket, self.timing
        while self.error is None:
            await asyncio.sleep(timing.tick_s)
            now = time.monotonic()
            self._look_after(now)
            socket.flush()
            if not socket.up:
                continue
            if not socket.has_unsent:
                self._post_all(self.inbox.acknowledge())
                self._post_all(self.inbox.repeated(self._calls.late(now, timing.repeat_s)))
            for stream in self.inbox.overdue(now, timing.answer_s):
                text = f"missing tokens did not come within {timing.answer_s:g} s of asking for them"
                self.inbox.fail(stream.request_id, RequestFailed(text).info)

    def _look_after(self, now: float) -> None:
        """Probe a coordinator that says nothing; give up a mute one, and the wait for the next when it is over."""
        socket = self._socket
        starting = socket.heard or not self.welcome.done()
        verdict = self._presence.judge(now, up=socket.up, starting=starting)
        if verdict is Verdict.PROBE and not socket.has_unsent:
            socket.send(StatusQuery(self._calls.next_id()))
        elif verdict is Verdict.DROP:
            socket.drop()
        elif verdict is Verdict.END:
            what = "nothing heard from the coordinator" if starting else "no coordinator has taken over"
            self.fail(EngineClosed(f"{what} for {self._presence.silent_s:.1f} s").info)

    def _supervised(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=f"drumline client: {what}")

        def ended(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                self.fail(EngineClosed(f"{what} failed: {type(error).__name__}: {error}").info)

        task.add_done_callback(ended)
        return task

    # -- the end

    def check_open(self) -> None:
        """Raises :class:`EngineClosed`, naming the cause, once the connection has ended."""
        if self.error is None:
            return
        if self.error.kind == EngineClosed.kind:
            raise EngineClosed(self.error.text, self.error)
        text = f"the engine has failed: {self.error.text}"
        info = msgspec.structs.replace(self.error, kind=EngineClosed.kind, retryable=False, text=text)
        raise EngineClosed(text, info)

    def fail(self, error: ErrorInfo) -> None:
        """Ends every call and every request with ``error``. The first error stays."""
        if self.error is not None:
            return
        self.error = error
        self.inbox.fail_all(error)
        self._calls.reject_all(error)
        if not self.welcome.done():
            self.welcome.set_exception(from_info(error))
            self.welcome.exception()

    async def close(self) -> None:
        """Says goodbye and lets go of the socket. Does not wait for anyone."""
        if self.error is None:
            self._socket.send(Goodbye(self.client_id))
        self.fail(EngineClosed("the engine is closed").info)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._socket.close()
