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
import threading
import time
import traceback
from pathlib import Path

import msgspec

from drumline.protocol.errors import EngineClosed, ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    CONTROL_METHODS,
    BeatWorker,
    Call,
    CallResult,
    Configure,
    Fault,
    FromWorker,
    Inject,
    Leave,
    Load,
    OpenStore,
    Shutdown,
    Step,
    ToWorker,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.workers.abort import AbortFlag
from drumline.workers.beats import Beats
from drumline.workers.control_faults import ControlFaults
from drumline.workers.identity import Identity
from drumline.workers.inbox import INBOX_LIMIT, CoordinatorLost, Inbox
from drumline.workers.outbox import RETRY_S, Outbox
from drumline.workers.output import is_pipe, silence
from drumline.workers.progress import Progress
from drumline.workers.registration import WELCOME_DEADLINE_S, Registration

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 1.0
FLUSH_DEADLINE_S = 1.0
EXIT_OWNER_GONE = 3
EXIT_TERMINATED = 143  # what a shell makes of SIGTERM
_STDERR = 2
_NOT_ADMITTED = "is not admitted"
_BEGIN_EPOCHS = (Leave, OpenStore, Configure)
_MAY_WAIT = (Step, Configure)

_encode = msgspec.msgpack.Encoder().encode


class Control:
    """The control thread and the queues between it and the main thread. ``token_file``: of a rank without a lifeline,
    there for as long as its engine is."""

    def __init__(
        self, identity: Identity, endpoint: str, lifeline: int | None, signals: int, token_file: Path | None = None
    ) -> None:
        self.identity = identity
        self.abort = AbortFlag()
        self.inbox = Inbox(self.abort)
        self.progress = Progress()
        self._registration = Registration(identity, endpoint, token_file, time.monotonic())
        self._connection = self._registration.connection
        self.outbox = Outbox(self._connection.send)
        self.faults = ControlFaults(self)
        self._lifeline = lifeline
        self._signals = signals
        self._watched = [fd for fd in (self.outbox.wake_fd, signals, lifeline) if fd is not None]
        if is_pipe(_STDERR):
            self._watched.append(_STDERR)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._beats = Beats()
        self._config_known = threading.Event()
        self._exit_at: float | None = None
        self._exit_code: int | None = None
        self._stale = 0

    def start(self) -> None:
        """Start the thread, which connects and says Hello. Call it once."""
        self._thread.start()

    @property
    def term(self) -> int:
        """The coordinator's, -1 before its Welcome."""
        return self._registration.term

    # ------------------------------------------------------------------------------------------- on the main thread

    def await_config(self) -> WorkerConfig | None:
        """The configuration that comes with the Welcome, which stays in the inbox; None when the engine ends first.
        Without a Welcome the control thread ends the process within ``WELCOME_DEADLINE_S``."""
        self._config_known.wait(WELCOME_DEADLINE_S + SHUTDOWN_GRACE_S)
        return self._registration.config

    def send(self, message: FromWorker) -> None:
        """Have ``message`` sent, as :meth:`Outbox.put`."""
        self.outbox.put(message)

    def grant_lease(self, lease_s: float) -> None:
        """Tell at once how long what runs may take; 0.0: no longer than usual."""
        self.progress.grant_lease(lease_s)
        self.outbox.wake()

    def finish(self, code: int) -> None:
        """Send what is queued, then end the process with ``code``. Never returns, and never hangs."""
        self._exit_code = code
        self.outbox.wake()
        self._thread.join(FLUSH_DEADLINE_S + 1.0)
        os._exit(code)

    # ---------------------------------------------------------------------------------------- on the control thread

    def _run(self) -> None:
        try:
            self._registration.greet(self.progress.loaded_digest)
            while self._exit_code is None:
                try:
                    self._turn()
                except EngineClosed as error:
                    self._lose_coordinator(error)
            self.leave(self._exit_code)
        except EngineClosed as error:
            if self._exit_code is None and self._exit_at is None:
                log.error("the coordinator is gone: %s", error.text)
                os._exit(EXIT_OWNER_GONE)
            os._exit(self._exit_code or 0)  # it said Shutdown, or was told of the end, and closed at once
        except BaseException:
            # Nobody would hear of a control thread that dies in silence, and nobody could reach the main one.
            log.critical("the control thread failed\n%s", traceback.format_exc())
            os._exit(1)

    def _lose_coordinator(self, error: EngineClosed) -> None:
        """Come out of the epoch and wait for the next one. Raises ``error`` when there is nothing to wait for."""
        self._take_last_word()
        if self._exit_at is not None or self._exit_code is not None:
            raise error
        if self._registration.lose(error, time.monotonic()):
            # Whatever the main thread waits for: nothing of this term goes on.
            term, epoch = self._registration.newest
            self.abort.abort_before(term, epoch + 1, "the coordinator is gone")
            for load in self.inbox.drop():
                self.outbox.loads.discard(load.term)
            self.inbox.put(CoordinatorLost(error.text))

    def _take_last_word(self) -> None:
        """A Shutdown that came before the connection ended and was not read yet: a send may have found the end."""
        with contextlib.suppress(EngineClosed):
            while (message := self._connection.recv_nowait()) is not None:
                if isinstance(message, Shutdown):
                    self._take(message)

    def _turn(self) -> None:
        ready = self._connection.poll(self._watched, self._timeout(time.monotonic()))
        if self._lifeline in ready:
            os._exit(EXIT_OWNER_GONE)
        if self._signals in ready:
            log.warning("SIGTERM")
            self.leave(EXIT_TERMINATED)
        if self.outbox.wake_fd in ready:
            os.eventfd_read(self.outbox.wake_fd)
        if _STDERR in ready:
            self._watched.remove(_STDERR)
            silence()
        if self._registration.on_lease:
            self.outbox.drop()
        else:
            self.outbox.drain()
        # One message a turn: a second look would hold the interpreter while the main thread wants it for the first.
        message = self._connection.recv_nowait()
        if message is not None:
            self._take(message)
        self._keep_time(time.monotonic())

    def _timeout(self, now: float) -> float:
        if self.outbox.waits:
            return RETRY_S
        registration = self._registration
        moments = [self._beats.due_at if registration.welcomed else registration.due_at(now), self.faults.due_at(now)]
        if self._exit_at is not None:
            moments.append(self._exit_at)
        return max(0.0, min(moments) - now)

    def _keep_time(self, now: float) -> None:
        if self._exit_at is not None and now >= self._exit_at:
            log.warning("shutdown: the main thread did not end within %.1f s", SHUTDOWN_GRACE_S)
            self.leave(0)
        self.faults.keep_time(now)
        if not self._registration.welcomed:
            self._registration.seek(now, self.progress.loaded_digest)
        elif self._beats.due(now, self.progress, self.progress.busy or len(self.inbox) > 0) and not self.outbox.waits:
            self.outbox.add(self._beat())

    def _beat(self) -> BeatWorker:
        progress, me, term = self.progress, self.identity, self.term
        at = progress.position
        epoch = at.epoch if at.term in (-1, term) else -1  # a new coordinator has yet to form one
        done, total = progress.load_done, progress.load_total
        return BeatWorker(term, epoch, me.rank, at.step, at.collective, at.inside, done, total, progress.lease_left())

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, WelcomeWorker):
            self._welcome(message)
        elif message.term < self.term:
            self._stale += 1
        elif isinstance(message, Call) and message.method in CONTROL_METHODS:
            self._answer(message)
        elif isinstance(message, Inject):
            self.faults.order(message.injections, self._registration.config)
        elif isinstance(message, Load):
            self._take_load(message)
        else:
            if isinstance(message, Shutdown):
                self._tell_why(message.reason)
                self._exit_at = time.monotonic() + SHUTDOWN_GRACE_S
                self.abort.abort_all(f"shutdown {message.reason}".rstrip())
                self._config_known.set()
            elif isinstance(message, _BEGIN_EPOCHS) and (message.term, message.epoch) > self._registration.newest:
                newest = self._registration.newest = (message.term, message.epoch)
                self.abort.abort_before(*newest, f"epoch {newest} begins")
            if isinstance(message, _MAY_WAIT):
                self._beats.work_comes(time.monotonic())
            self._hand_over(message)

    def _tell_why(self, reason: str) -> None:
        """A process whose place is taken says so: it may have been stopped while that happened."""
        me = self.identity
        if me.incarnation in reason or _NOT_ADMITTED in reason:
            text = "this process (rank %d, incarnation %s) was replaced: %s"
            log.warning(text, me.rank, me.incarnation, reason)

    def _take_load(self, load: Load) -> None:
        if load.term in self.outbox.loads:
            self._stale += 1  # it is under way
            return
        self.outbox.loads.add(load.term)
        self._hand_over(load)

    def _welcome(self, message: WelcomeWorker) -> None:
        try:
            counts = self._registration.accept(message)
        except ProtocolError as error:
            self._fault(error.info)
            self.leave(1)
        except EngineClosed:
            self._stale += 1
            raise
        if not counts:
            self._stale += 1
            return
        self.outbox.term = message.term
        self._beats.start(message.config.beat_interval_s)
        self._hand_over(message)
        self._config_known.set()
        if message.injections:
            self.faults.order(message.injections, message.config)

    def _hand_over(self, message: ToWorker) -> None:
        if not self.inbox.put(message):
            text = f"{type(message).__name__} found while {INBOX_LIMIT} messages wait; the limit is {INBOX_LIMIT}"
            at = message.step if isinstance(message, Step) else -1
            self._fault(ErrorInfo(kind="protocol", text=text, step=at))

    def _fault(self, info: ErrorInfo) -> None:
        me, at = self.identity, self.progress.position
        info = msgspec.structs.replace(info, rank=me.rank, incarnation=me.incarnation, epoch=at.epoch)
        self.progress.faults += 1
        log.error("fault: %s", info.text)
        self.outbox.add(Fault(max(at.term, self.term), at.epoch, me.rank, info))

    def _answer(self, call: Call) -> None:
        at, progress = self.progress.position, self.progress
        value: dict[str, object] = {"pid": os.getpid(), **at._asdict()}
        if call.method == "stats":
            value |= {
                "steps": progress.steps,
                "dummy_steps": progress.dummy_steps,
                "stale": progress.stale + self._stale + self.inbox.stale,
                "faults": progress.faults,
                "load_done": progress.load_done,
                "load_total": progress.load_total,
                "inbox": len(self.inbox),
                "outbox": len(self.outbox),
                "replies_dropped": self.outbox.dropped,
                "injections_refused": self.faults.refused,
                "socket": msgspec.structs.asdict(self._connection.statistics()),
            }
        self.outbox.add(CallResult(call.term, call.epoch, call.call_id, self.identity.rank, True, _encode(value)))

    def leave(self, code: int) -> None:
        """Send what is queued and end the process; a peer that reads nothing is waited for one second."""
        self.abort.abort_all("the process ends")
        with contextlib.suppress(EngineClosed):  # to nobody there is nothing to say
            self.outbox.drain_within(FLUSH_DEADLINE_S)
        self._connection.close(FLUSH_DEADLINE_S)
        os._exit(code)
