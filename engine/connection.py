"""One connection of the client library to a coordinator: its socket, its calls, and how it notices an end.

Two tasks run while it is open. One reads: every message goes to the call that waits for it or to the inbox. One ticks:
acknowledges, and probes a silent coordinator. The death of either, silence, or the engine's own failure ends the
connection the same way: every call and every request gets a typed error and wakes up.

No beat is sent. That this process lives the coordinator sees by its connection; a beat from this loop would stop
whenever the app blocks its loop for a while, and its requests would be cancelled for that.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from drumline.engine.inbox import Inbox
from drumline.engine.streams import RequestStream
from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed, ErrorInfo, RequestFailed, from_info
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Behind,
    CallRanksResult,
    Cancel,
    Cancelled,
    Event,
    Failed,
    Finished,
    FromClient,
    Goodbye,
    HelloClient,
    LayoutFacts,
    Rejected,
    Resumed,
    StatusQuery,
    StatusReport,
    ToClient,
    Tokens,
    WelcomeClient,
)
from drumline.protocol.sockets import Dealer, SendResult

_CAUSE_GRACE_S = 1.0


class Timing(msgspec.Struct, frozen=True):
    """Seconds. ``tick_s``: between looks at the clock. ``silence_s``: nothing heard for so long means that the
    coordinator is gone; it is probed from ``probe_s`` on. ``start_silence_s``: the same before it is ready.
    ``answer_s``: how long a call waits."""

    tick_s: float = 1.0
    probe_s: float = 4.0
    silence_s: float = 15.0
    start_silence_s: float = 150.0
    answer_s: float = 30.0


class Connection:
    """Made in a running loop, used from that loop alone. ``cause`` is set by whoever watches the coordinator's process
    when that has ended; it tells more than a lost connection does."""

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
        self._call_ids = itertools.count(1)
        self.inbox = Inbox(self.next_call_id)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._cancels: dict[int, RequestStream | None] = {}
        self._unsent: collections.deque[FromClient] = collections.deque()
        self._heard = False
        self._cause = cause
        self._context = zmq.Context()
        self._dealer: Dealer[ToClient] = Dealer(self._context, endpoint, Codec(ToClient))
        self.welcome: asyncio.Future[WelcomeClient] = asyncio.get_running_loop().create_future()
        self._reader = self._supervised(self._read(), "reading from the coordinator")
        self._tasks = [self._reader, self._supervised(self._tick(), "watching the coordinator")]
        if cause is not None:
            self._tasks.append(self._supervised(self._watch(cause), "watching the processes"))
        self.post(HelloClient(PROTOCOL_VERSION, self.client_id))

    # -- out

    def next_call_id(self) -> int:
        """From 1, each once on this connection: by it an answer finds its question."""
        return next(self._call_ids)

    def post(self, message: FromClient) -> None:
        """Sends ``message``, or keeps it until the socket takes it again. What is kept is bounded by live requests."""
        if self.error is None:
            if isinstance(message, Cancel):
                # By the time of the confirmation the id may be that of another request.
                self._cancels[message.call_id] = self.inbox.requests.get(message.request_id)
            self._unsent.append(message)
            self._flush()

    def _flush(self) -> None:
        """What is sent to a lost connection is dropped: the reader, who has yet to read what came before, ends it."""
        while self._unsent:
            # Taken out first: a message that cannot be encoded fails its sender alone, not everyone after it.
            message = self._unsent.popleft()
            if self._dealer.send(message) is SendResult.FULL:
                self._unsent.appendleft(message)
                return

    async def call(self, make: Callable[[int], FromClient], what: str, timeout: float | None = None) -> Any:
        """Sends what ``make`` makes of a call id and returns the answer. Raises the error that is the answer,
        :class:`RequestFailed` when none comes in time, :class:`EngineClosed` when the connection ends meanwhile."""
        self.check_open()
        limit = self.timing.answer_s if timeout is None else timeout
        call_id = self.next_call_id()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            self.post(make(call_id))
            async with asyncio.timeout(limit):
                return await answer
        except TimeoutError:
            raise RequestFailed(f"the coordinator did not answer to {what} within {limit:g} s") from None
        finally:
            self._calls.pop(call_id, None)

    def cancel_quietly(self, request_id: str) -> None:
        """Cancels without waiting; the inbox frees the id when the engine confirms."""
        self.post(Cancel(self.next_call_id(), request_id))

    # -- in

    async def _read(self) -> None:
        while True:
            try:
                message = await self._dealer.recv()
            except EngineClosed as lost:
                self.fail(await self._cause_of(lost))
                return
            self._heard = True
            self._flush()
            self._take(message)

    def _take(self, message: ToClient) -> None:
        now = time.monotonic()
        match message:
            case Tokens():
                self._post_all(self.inbox.tokens(message, now))
            case Finished():
                self._post_all(self.inbox.finished(message, now))
            case Behind():
                self._post_all(self.inbox.behind(now))
            case Resumed():
                self._post_all(self.inbox.resumed(message))
            case Event():
                self._on_event(message)
            case WelcomeClient():
                if not self.welcome.done():
                    self.welcome.set_result(message)
            case _:
                self._take_answer(message)

    def _take_answer(
        self, message: Accepted | Rejected | Cancelled | Failed | StatusReport | CallRanksResult | LayoutFacts
    ) -> None:
        match message:
            case Rejected():
                self._reject(message)
            case Failed():
                self._failed(message)
            case Accepted():
                self.inbox.accepted(message)
                self._answer(message.call_id, message)
            case Cancelled():
                self.inbox.cancelled(self._cancels.pop(message.call_id, None))
                self._answer(message.call_id, message)
            case StatusReport() | CallRanksResult() | LayoutFacts():
                self._answer(message.call_id, message)

    def _post_all(self, messages: list[FromClient]) -> None:
        for message in messages:
            self.post(message)

    def _answer(self, call_id: int, answer: object) -> None:
        """A late answer, whose caller has given up, is dropped."""
        waiting = self._calls.pop(call_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _reject(self, message: Rejected) -> None:
        self._cancels.pop(message.call_id, None)
        waiting = self._calls.pop(message.call_id, None)
        if waiting is not None:
            if not waiting.done():
                waiting.set_exception(from_info(message.error))
            return
        stream = self.inbox.requests.get(message.request_id)
        if stream is not None and stream.resuming_since is not None:
            self.inbox.fail(message.request_id, message.error)

    def _failed(self, message: Failed) -> None:
        if message.request_id:
            self.inbox.fail(message.request_id, message.error)
        else:
            self.fail(message.error)

    # -- staying alive

    async def _cause_of(self, lost: EngineClosed) -> ErrorInfo:
        if self._cause is not None:
            await asyncio.wait([self._cause], timeout=_CAUSE_GRACE_S)
            if self._cause.done() and not self._cause.cancelled():
                return self._cause.result()
        return lost.info

    async def _watch(self, cause: asyncio.Future[ErrorInfo]) -> None:
        found = await asyncio.shield(cause)
        # What the coordinator said itself before it ended tells more still.
        await asyncio.wait([self._reader], timeout=_CAUSE_GRACE_S)
        self.fail(found)

    async def _tick(self) -> None:
        silent = 0.0
        last = time.monotonic()
        while True:
            await asyncio.sleep(self.timing.tick_s)
            now = time.monotonic()
            # Time in which this loop itself did not run does not count against the coordinator.
            silent += min(now - last, 2 * self.timing.tick_s)
            last = now
            if self._heard:
                self._heard = False
                silent = 0.0
            limit = self.timing.silence_s if self.welcome.done() else self.timing.start_silence_s
            if silent > limit:
                self.fail(EngineClosed(f"nothing heard from the coordinator for {silent:.1f} s").info)
                return
            self._flush()
            if not self._unsent:
                self._post_all(self.inbox.acknowledge())
                if silent >= self.timing.probe_s:
                    self.post(StatusQuery(self.next_call_id()))
            for stream in self.inbox.overdue(now, self.timing.answer_s):
                text = f"missing tokens did not come within {self.timing.answer_s:g} s of asking for them"
                self.inbox.fail(stream.request_id, RequestFailed(text).info)

    def _supervised(self, work: Any, what: str) -> asyncio.Task[None]:
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
        calls, self._calls = self._calls, {}
        for waiting in calls.values():
            if not waiting.done():
                waiting.set_exception(from_info(error))
        if not self.welcome.done():
            self.welcome.set_exception(from_info(error))
            self.welcome.exception()

    async def close(self) -> None:
        """Says goodbye and lets go of the socket. Does not wait for anyone."""
        if self.error is None:
            self.post(Goodbye(self.client_id))
        self.fail(EngineClosed("the engine is closed").info)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dealer.close()
        await asyncio.to_thread(self._context.term)
