"""The coordinator as its supervisor sees it: one process after another, each of a higher term than the last.

One that is killed, crashes or falls silent is followed by the next at once, at the same endpoints: ranks keep their
weights, clients come back. One that says why it cannot go on, or ends cleanly, ends the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from drumline.engine.launch.order import MAX_LINE_BYTES, Order, encode_line, read_report
from drumline.engine.launch.owned_process import OwnedProcess, how_ended
from drumline.engine.launch.restart_limit import RestartLimit
from drumline.engine.launch.roster import Roster
from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed, ErrorInfo
from drumline.protocol.messages import PROTOCOL_VERSION, FromSupervisor, HelloSupervisor, Stopping, ToSupervisor
from drumline.protocol.sockets import Dealer

log = logging.getLogger(__name__)

SILENCE_S = 10.0
START_SILENCE_S = 60.0
"""Before a coordinator has said anything it reads its journal."""
LOST_S = 2.0
"""How long a process may live whose connection is lost, and which has not said that it ends."""
MODULE = "drumline.engine.launch.coordinator"


class CoordinatorLife:
    """One coordinator, from its start to its end. ``process`` is None where it runs in the app (inline)."""

    def __init__(self, process: OwnedProcess | None, dealer: Dealer[ToSupervisor]) -> None:
        self.process = process
        self.dealer = dealer
        self.error: ErrorInfo | None = None
        self.ending = False
        self.heard_at: float | None = None
        self.silent_s = 0.0
        self.receiving: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """0 where it has no process of its own."""
        return self.process.pid if self.process is not None else 0

    def heard(self, now: float) -> None:
        """It has said something."""
        self.silent_s = 0.0
        if self.heard_at is None:
            self.heard_at = now

    def kill(self) -> None:
        """SIGKILL, which ends a stopped process too."""
        if self.process is not None:
            self.process.signal(signal.SIGKILL)


class CoordinatorKeeper:
    """``on_message`` gets what the coordinator of the moment says; ``on_started(pid)`` is told of each one;
    ``on_end(error)`` once that there is none and will be none. ``roster``: the workers that live."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        order: Order,
        roster: Roster,
        *,
        on_message: Callable[[ToSupervisor], None],
        on_started: Callable[[int], None],
        on_end: Callable[[ErrorInfo | None], None],
    ) -> None:
        self._loop = loop
        self._order = order
        self._roster = roster
        self._on_message = on_message
        self._on_started = on_started
        self._on_end = on_end
        self._context: zmq.Context[Any] = zmq.Context()
        self._restarts = RestartLimit(order.config.faults.restart_limit)
        self._term = order.term
        self._life: CoordinatorLife | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._stopping = False
        self._was_heard = False

    @property
    def process(self) -> OwnedProcess | None:
        """The process of the moment; it may have ended."""
        return self._life.process if self._life is not None else None

    def start(self) -> None:
        """Start the first one, or connect to the one in the app. Raises OSError."""
        self._begin()

    def _begin(self) -> None:
        lines = bytearray()
        process: OwnedProcess | None = None
        if self._order.with_coordinator:
            order = msgspec.structs.replace(self._order, owner_pid=os.getpid(), term=self._term, import_path=())
            process = OwnedProcess(
                self._loop,
                MODULE,
                [],
                on_output=lambda data: self._output(life, lines, data),
                on_exit=lambda code, number: self._ended(life, code, number),
                first_line=encode_line(order),
            )
        life = CoordinatorLife(process, Dealer(self._context, self._order.worker_endpoint, Codec(ToSupervisor)))
        self._life = life
        self._on_started(life.pid)
        members = self._roster.members
        life.dealer.send(HelloSupervisor(PROTOCOL_VERSION, self._order.supervisor_token, os.getpid(), members))
        life.receiving = self._loop.create_task(self._receive(life), name="receive from the coordinator")
        life.receiving.add_done_callback(self._receiving_ended)

    # ------------------------------------------------------------------------------------------------------- messages

    def say(self, message: FromSupervisor) -> None:
        """Tell the coordinator. What is told while there is none is in the roster that the next one gets."""
        if self._life is not None:
            self._life.dealer.send(message)

    async def _receive(self, life: CoordinatorLife) -> None:
        while True:
            try:
                message = await life.dealer.recv()
            except EngineClosed as error:
                # The exit of its process, which is about to be told, says more than its lost connection.
                self._loop.call_later(LOST_S, self._lost, life, error.text)
                return
            life.heard(time.monotonic())
            self._was_heard = True
            if isinstance(message, Stopping):
                life.ending = True
                life.error = life.error or message.error
            self._on_message(message)

    def _receiving_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "supervisor task died", "exception": error, "task": task})
            self._fail(f"a task of the supervisor died: {error!r}")

    def _output(self, life: CoordinatorLife, lines: bytearray, data: bytes) -> None:
        """Keep a fatal error that the coordinator writes; anything else on its stdout goes to stderr."""
        lines += data
        while (end := lines.find(b"\n")) >= 0:
            line = bytes(lines[: end + 1])
            del lines[: end + 1]
            report = read_report(line)
            if report is not None and report.error is not None:
                life.error = report.error
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
        del lines[:-MAX_LINE_BYTES]

    # ----------------------------------------------------------------------------------------------------------- ends

    def tick(self, elapsed_s: float) -> None:
        """To be called about once a second, with the time in which this process ran since: kills a silent one."""
        life = self._life
        if life is None or life.process is None or life.process.exited.is_set() or self._stopping:
            return
        life.silent_s += elapsed_s
        if life.silent_s > (SILENCE_S if life.heard_at is not None else START_SILENCE_S):
            log.error("the coordinator (pid %d) has been silent for %.0f s; it is killed", life.pid, life.silent_s)
            life.kill()

    def _lost(self, life: CoordinatorLife, text: str) -> None:
        if life is not self._life or life.ending or self._stopping:
            return
        if life.process is None:
            self._fail(text)
        elif not life.process.exited.is_set():
            log.error("%s, but the coordinator (pid %d) lives on; it is killed", text, life.pid)
            life.kill()

    def _ended(self, life: CoordinatorLife, code: int, number: int) -> None:
        life.dealer.close(0.0)
        if life is not self._life or self._stopping:
            return
        if life.error is not None:
            self._on_end(life.error)
            return
        text = f"the coordinator (pid {life.pid}) ended with {how_ended(code, number)}"
        now = time.monotonic()
        crashed = number != 0 or (code != 0 and self._was_heard)
        lived_s = now - life.heard_at if life.heard_at is not None else 0.0
        pause = self._restarts.pause(now, lived_s=lived_s) if crashed and not life.ending else None
        if pause is None:
            self._fail(text)
            return
        log.error("%s; another one is started", text)
        self._roster.next_coordinator()
        self._restart = self._loop.call_later(pause, self._begin_again)

    def _begin_again(self) -> None:
        if self._stopping:
            return
        self._term += 1
        try:
            self._begin()
        except OSError as error:
            self._fail(f"the coordinator cannot be started again: {error}")

    def _fail(self, text: str) -> None:
        if not self._stopping:
            log.error(text)
            self._on_end(ErrorInfo(kind="engine_closed", text=text))

    # ------------------------------------------------------------------------------------------------------- the stop

    def stop(self) -> None:
        """No other one is started from here on."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()

    async def close(self) -> None:
        """Let go of the connection."""
        life = self._life
        if life is not None:
            if life.receiving is not None:
                life.receiving.cancel()
                await asyncio.gather(life.receiving, return_exceptions=True)
            life.dealer.close()
        self._context.term()
