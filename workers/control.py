"""The control thread: the one part of a worker that always answers.

It owns the socket to the coordinator, watches the lifeline and SIGTERM, sends beats, and answers ``ping`` and ``stats``
while the main thread is inside a step. Orders for the main thread go through a bounded queue, and so do the replies;
an eventfd wakes this thread's poll when there is something to send. It imports no torch, so that it runs before torch
is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec
import zmq

from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed, ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    CONTROL_METHODS,
    PROTOCOL_VERSION,
    BeatWorker,
    Call,
    CallResult,
    Configure,
    Fault,
    FromWorker,
    HelloWorker,
    Leave,
    OpenStore,
    Shutdown,
    Step,
    ToWorker,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.sockets import SendResult, ThreadDealer
from drumline.workers.abort import AbortFlag
from drumline.workers.progress import Progress

log = logging.getLogger(__name__)

INBOX_LIMIT = 32
"""The steps in flight (pipeline stages and one) and eight control calls fit, for up to 22 stages."""
OUTBOX_LIMIT = 64
WELCOME_DEADLINE_S = 30.0
LOOK_S = 0.5
SHUTDOWN_GRACE_S = 1.0
FLUSH_DEADLINE_S = 1.0
ROOM_DEADLINE_S = 5.0
RETRY_S = 0.01
EXIT_OWNER_GONE = 3
EXIT_TERMINATED = 143  # what a shell makes of SIGTERM

_encode = msgspec.msgpack.Encoder().encode


class Identity(msgspec.Struct, frozen=True):
    """Who this process is: its rank, the uuid of this start, and the launch token that it shows."""

    rank: int
    incarnation: str
    token: str


class Control:
    """The control thread and the queues between it and the main thread. ``token_file``: of a rank without a lifeline,
    there for as long as its engine is."""

    def __init__(
        self, identity: Identity, endpoint: str, lifeline: int | None, signals: int, token_file: Path | None = None
    ) -> None:
        self.identity = identity
        # SimpleQueue is one lock in C; its bound is kept by the only thread that puts.
        self.inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self.abort = AbortFlag()
        self.progress = Progress()
        self._endpoint = endpoint
        self._lifeline = lifeline
        self._token_file = token_file
        self._signals = signals
        self._outbox: queue.SimpleQueue[FromWorker] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched = [fd for fd in (self._wake, signals, lifeline) if fd is not None]
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._welcome_by = time.monotonic() + WELCOME_DEADLINE_S
        self._context: zmq.Context[Any]
        self._dealer: ThreadDealer[ToWorker]
        self._held: FromWorker | None = None
        self._term = -1
        self._newest = (-1, -1)
        self._welcomed = False
        self._config: WorkerConfig | None = None
        self._config_known = threading.Event()
        self._beat_interval = 1.0
        self._next_beat = 0.0
        self._exit_at: float | None = None
        self._exit_code: int | None = None
        self._stale = 0

    def start(self) -> None:
        """Start the thread, which connects and says Hello. Call it once."""
        self._thread.start()

    # ------------------------------------------------------------------------------------------- on the main thread

    def await_config(self) -> WorkerConfig | None:
        """The configuration that comes with the Welcome, which stays in the inbox; None when the engine ends first.
        Without a Welcome the control thread ends the process within ``WELCOME_DEADLINE_S``."""
        self._config_known.wait(WELCOME_DEADLINE_S + SHUTDOWN_GRACE_S)
        return self._config

    def send(self, message: FromWorker) -> None:
        """Have ``message`` sent. Waits at most 5 s for room, of which there is plenty while the coordinator reads.

        Raises:
            EngineClosed: the queue stayed full.
        """
        if self._outbox.qsize() >= OUTBOX_LIMIT:
            self._await_room()
        self._outbox.put(message)
        os.eventfd_write(self._wake, 1)

    def _await_room(self) -> None:
        deadline = time.monotonic() + ROOM_DEADLINE_S
        while self._outbox.qsize() >= OUTBOX_LIMIT:
            if time.monotonic() > deadline:
                raise EngineClosed(f"{OUTBOX_LIMIT} replies wait and the coordinator reads none")
            time.sleep(RETRY_S)

    def finish(self, code: int) -> None:
        """Send what is queued, then end the process with ``code``. Never returns, and never hangs."""
        self._exit_code = code
        os.eventfd_write(self._wake, 1)
        self._thread.join(FLUSH_DEADLINE_S + 1.0)
        os._exit(code)

    # ---------------------------------------------------------------------------------------- on the control thread

    def _run(self) -> None:
        try:
            self._context = zmq.Context()
            self._dealer = ThreadDealer(self._context, self._endpoint, Codec(ToWorker))
            self._dealer.send(self._hello())
            while self._exit_code is None:
                try:
                    self._turn()
                except EngineClosed as error:
                    if not self._await_another(error):
                        raise
            self._leave(self._exit_code)
        except EngineClosed as error:
            if self._exit_code is None and self._exit_at is None:
                log.error("the coordinator is gone: %s", error.text)
                os._exit(EXIT_OWNER_GONE)
            os._exit(self._exit_code or 0)  # it said Shutdown, or was told of the end, and closed at once
        except BaseException:
            # Nobody would hear of a control thread that dies in silence, and nobody could reach the main one.
            log.critical("the control thread failed\n%s", traceback.format_exc())
            os._exit(1)

    def _hello(self) -> HelloWorker:
        me, (term, epoch) = self.identity, self._newest
        digest = self.progress.loaded_digest
        pid, host = os.getpid(), socket.gethostname()
        return HelloWorker(
            PROTOCOL_VERSION,
            me.token,
            me.rank,
            me.incarnation,
            pid,
            host,
            max(term, self._term, 0),
            max(epoch, 0),
            bool(digest),
            digest,
        )

    def _await_another(self, lost: EngineClosed) -> bool:
        """The coordinator is gone: keep the weights and say Hello to the next one, within the lease. False when there
        is nothing to wait for."""
        self._take_last_word()
        if self._exit_at is not None:
            return False
        lease = self._config.coordinator_lease_s if self._config is not None else 0.0
        now = time.monotonic()
        if self._welcomed and lease > 0:
            log.warning("the coordinator is gone (%s); waiting %.0f s for the next one", lost.text, lease)
            self._welcome_by = now + lease
        if lease <= 0 or now >= self._welcome_by:
            return False
        self._welcomed = False
        # Whatever the main thread waits for: nothing of this term goes on.
        self.abort.abort_before(self._term + 1, 0, "the coordinator is gone")
        self._drop_replies()
        self._dealer.close(linger_s=0.0)
        # One that died while it started is tried again, but not in a tight loop.
        time.sleep(RETRY_S)
        self._dealer = ThreadDealer(self._context, self._endpoint, Codec(ToWorker))
        self._dealer.send(self._hello())
        return True

    def _take_last_word(self) -> None:
        """A Shutdown that came before the connection ended and was not read yet: a send may have found the end first."""
        with contextlib.suppress(EngineClosed):
            while (message := self._dealer.recv_nowait()) is not None:
                if isinstance(message, Shutdown):
                    self._take(message)

    def _drop_replies(self) -> None:
        """What was meant for a coordinator that is gone."""
        self._held = None
        while not self._outbox.empty():
            self._outbox.get_nowait()

    def _turn(self) -> None:
        ready = self._dealer.poll(self._watched, self._timeout())
        if self._lifeline in ready:
            os._exit(EXIT_OWNER_GONE)
        if self._signals in ready:
            log.warning("SIGTERM")
            self._leave(EXIT_TERMINATED)
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._welcomed or self._term < 0:
            self._drain_outbox()
        else:
            self._drop_replies()
        # One message a turn: a second look would hold the interpreter while the main thread wants it for the first.
        message = self._dealer.recv_nowait()
        if message is not None:
            self._take(message)
        self._keep_time(time.monotonic())

    def _timeout(self) -> float:
        if self._held is not None:
            return RETRY_S
        now = time.monotonic()
        due = self._next_beat if self._welcomed else min(self._welcome_by, now + LOOK_S)
        if self._exit_at is not None:
            due = min(due, self._exit_at)
        return max(0.0, due - now)

    def _keep_time(self, now: float) -> None:
        if self._exit_at is not None and now >= self._exit_at:
            log.warning("shutdown: the main thread did not end within %.1f s", SHUTDOWN_GRACE_S)
            self._leave(0)
        if not self._welcomed:
            if now >= self._welcome_by:
                raise EngineClosed(f"no welcome from {self._endpoint} in time")
            if self._token_file is not None and not self._token_file.exists():
                self._welcome_by = 0.0
                # A connection that never stood cannot be lost; the folder of an engine goes when the engine does.
                raise EngineClosed(f"the engine is gone, and {self._token_file} with it")
        elif now >= self._next_beat:
            self._next_beat = now + self._beat_interval
            if self._held is None:
                self._transmit(self._beat())

    def _beat(self) -> BeatWorker:
        progress = self.progress
        at = progress.position
        return BeatWorker(
            max(at.term, self._term),
            at.epoch,
            self.identity.rank,
            at.step,
            at.collective,
            at.inside,
            progress.load_done,
            progress.load_total,
        )

    def _drain_outbox(self) -> None:
        if self._held is not None and not self._transmit(self._held):
            return
        while self._held is None:
            try:
                message = self._outbox.get_nowait()
            except queue.Empty:
                return
            self._transmit(message)

    def _transmit(self, message: FromWorker) -> bool:
        """Send, or hold the message back until the socket takes it. Raises EngineClosed when the peer is gone."""
        result = self._dealer.send(message)
        if result is SendResult.GONE:
            raise EngineClosed(f"the connection to {self._endpoint} is lost")
        self._held = None if result is SendResult.SENT else message
        return self._held is None

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, WelcomeWorker):
            self._welcome(message)
        elif message.term < self._term:
            self._stale += 1
        elif isinstance(message, Call) and message.method in CONTROL_METHODS:
            self._answer(message)
        else:
            if isinstance(message, Shutdown):
                self._exit_at = time.monotonic() + SHUTDOWN_GRACE_S
                self.abort.abort_all(f"shutdown {message.reason}".rstrip())
                self._config_known.set()
            elif isinstance(message, Leave | OpenStore | Configure) and (message.term, message.epoch) > self._newest:
                self._newest = (message.term, message.epoch)
                self.abort.abort_before(*self._newest, f"epoch {self._newest} begins")
            self._hand_over(message)

    def _welcome(self, message: WelcomeWorker) -> None:
        if self._welcomed or message.term < self._term:
            self._stale += 1
            return
        if message.version != PROTOCOL_VERSION:
            text = f"protocol version {message.version} found, {PROTOCOL_VERSION} spoken here"
            self._fault(ProtocolError(text).info)
            self._leave(1)
        self._welcomed = True
        self._term = message.term
        self._beat_interval = message.config.beat_interval_s
        self._hand_over(message)
        self._config = message.config
        self._config_known.set()

    def _hand_over(self, message: ToWorker) -> None:
        if self.inbox.qsize() < INBOX_LIMIT or isinstance(message, Shutdown):
            self.inbox.put(message)
        else:
            text = f"{type(message).__name__} found while {INBOX_LIMIT} messages wait; the limit is {INBOX_LIMIT}"
            at = message.step if isinstance(message, Step) else -1
            self._fault(ErrorInfo(kind="protocol", text=text, step=at))

    def _fault(self, info: ErrorInfo) -> None:
        me, at = self.identity, self.progress.position
        info = msgspec.structs.replace(info, rank=me.rank, incarnation=me.incarnation, epoch=at.epoch)
        self.progress.faults += 1
        log.error("fault: %s", info.text)
        self._outbox.put(Fault(max(at.term, self._term), at.epoch, me.rank, info))
        self._drain_outbox()

    def _answer(self, call: Call) -> None:
        at, progress = self.progress.position, self.progress
        value: dict[str, object] = {"pid": os.getpid(), **at._asdict()}
        if call.method == "stats":
            value |= {
                "steps": progress.steps,
                "dummy_steps": progress.dummy_steps,
                "stale": progress.stale + self._stale,
                "faults": progress.faults,
                "load_done": progress.load_done,
                "load_total": progress.load_total,
                "inbox": self.inbox.qsize(),
                "outbox": self._outbox.qsize(),
                "socket": msgspec.structs.asdict(self._dealer.statistics()),
            }
        # Behind whatever waits for room: only one message can be held back.
        self._outbox.put(CallResult(call.term, call.epoch, call.call_id, self.identity.rank, True, _encode(value)))
        self._drain_outbox()

    def _leave(self, code: int) -> None:
        """Send what is queued and end the process; a peer that reads nothing is waited for one second."""
        self.abort.abort_all("the process ends")
        deadline = time.monotonic() + FLUSH_DEADLINE_S
        while time.monotonic() < deadline:
            self._drain_outbox()
            if self._held is None and self._outbox.empty():
                break
            time.sleep(RETRY_S)
        self._dealer.close(linger_s=FLUSH_DEADLINE_S)
        # Terminating the context is what waits for the linger; on its own thread, so that the deadline is ours.
        ended = threading.Thread(target=self._context.term, daemon=True)
        ended.start()
        ended.join(FLUSH_DEADLINE_S)
        os._exit(code)
