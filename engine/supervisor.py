"""The process that owns all others of an engine: ``python -m drumline.engine.supervisor``.

It reads one :class:`~drumline.engine.launch.order.Order` from stdin, starts the coordinator and what starts the ranks
(:mod:`~drumline.engine.launch.rank_processes`), starts and kills workers as the coordinator asks, and reports every
exit at once. Its stdin is its lifeline: when it ends, or SIGTERM comes, or the coordinator ends, everything it owns
ends within 3 s and the runtime directory is removed. A fatal error goes to the owner as a JSON line on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from typing import Any

import zmq

from drumline.engine.launch.order import (
    MAX_LINE_BYTES,
    Order,
    Report,
    encode_line,
    log_to_stderr,
    read_order,
    read_report,
    remove_runtime_dir,
)
from drumline.engine.launch.owned_process import OwnedProcess, watch_owner
from drumline.engine.launch.rank_processes import RankProcesses, rank_processes
from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed, ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Beat,
    FromSupervisor,
    HelloSupervisor,
    Kill,
    Spawn,
    Stopping,
    ToSupervisor,
)
from drumline.protocol.sockets import Dealer

log = logging.getLogger(__name__)

BEAT_S = 1.0
GRACE_S = 1.0
"""How long coordinator and workers may take to end by themselves."""
TERM_S = 0.6
"""How long they may take after that, once told by signal, before they are killed."""
KILL_S = 0.8


class Supervisor:
    """Owns the coordinator and the workers of this host from :meth:`run` on."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._error: ErrorInfo | None = None
        self._stopping = False
        self._lines = bytearray()
        self._coordinator_error: ErrorInfo | None = None
        self._unsent: deque[FromSupervisor] = deque(maxlen=4096)
        self._context: zmq.Context[Any] = zmq.Context()
        self._ranks: RankProcesses | None = None
        self._coordinator: OwnedProcess | None = None
        self._dealer: Dealer[ToSupervisor] | None = None

    async def run(self) -> int:
        """Run until the owner is gone or something fatal happens. Returns the exit code: 1 after an error."""
        watch_owner(self._loop, 0, self._order.owner_pid, lambda: self._end(None))
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._end, None)
        tasks: list[asyncio.Task[None]] = []
        try:
            try:
                self._start()
            except OSError as error:
                self._fail(f"a process cannot be started: {error}")
            tasks = [self._loop.create_task(self._receive()), self._loop.create_task(self._beat())]
            for task in tasks:
                task.add_done_callback(self._task_ended)
            await self._stop.wait()
        finally:
            try:
                await self._stop_all()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if self._dealer is not None:
                    self._dealer.close()
                self._context.term()
                remove_runtime_dir(self._order.runtime_dir)
        self._tell(Report("stopped") if self._error is None else Report("failed", os.getpid(), self._error))
        return 0 if self._error is None else 1

    def _start(self) -> None:
        # What starts the ranks first: importing torch is what a start waits for.
        self._ranks = rank_processes(
            self._loop,
            self._order.config.parallel,
            self._order.worker_endpoint,
            on_spawned=self._say,
            on_exited=self._say,
            on_lost=lambda text: self._fail(text),
            import_path=self._order.import_path,
        )
        if self._order.with_coordinator:
            self._coordinator = OwnedProcess(
                self._loop,
                "drumline.engine.launch.coordinator",
                [],
                on_output=self._coordinator_output,
                on_exit=self._coordinator_ended,
                first_line=encode_line(
                    Order(
                        config=self._order.config,
                        runtime_dir=self._order.runtime_dir,
                        client_endpoint=self._order.client_endpoint,
                        worker_endpoint=self._order.worker_endpoint,
                        supervisor_token=self._order.supervisor_token,
                        owner_pid=os.getpid(),
                        term=self._order.term,
                    )
                ),
            )
        self._tell(Report("started", self._coordinator.pid if self._coordinator is not None else os.getppid()))
        self._dealer = Dealer(self._context, self._order.worker_endpoint, Codec(ToSupervisor))
        self._say(HelloSupervisor(PROTOCOL_VERSION, self._order.supervisor_token, os.getpid()))

    # ----------------------------------------------------------------------------------------- the coordinator

    def _say(self, message: FromSupervisor) -> None:
        if self._dealer is not None:
            self._dealer.send(message)

    async def _receive(self) -> None:
        if self._dealer is None:
            return  # the start failed and the end is under way
        while True:
            try:
                message = await self._dealer.recv()
            except EngineClosed as error:
                # The exit of the coordinator, which is about to be told, says more than its lost connection.
                self._loop.call_later(GRACE_S, self._fail, error.text)
                return
            if isinstance(message, Spawn):
                if self._ranks is not None and not self._stopping:
                    self._ranks.spawn(message.rank, self._order.worker_endpoint, message.token)
            elif isinstance(message, Kill):
                if self._ranks is not None:
                    self._ranks.kill(message.pid, signal.SIGKILL)
            elif isinstance(message, Stopping):
                self._coordinator_error = self._coordinator_error or message.error
                if self._coordinator is None:
                    self._end(message.error)
                else:
                    # It ends by itself; its exit is awaited for the grace period, by the stop.
                    self._loop.call_later(GRACE_S, self._end, message.error)

    async def _beat(self) -> None:
        while True:
            self._say(Beat(os.getpid()))
            await asyncio.sleep(BEAT_S)

    def _coordinator_output(self, data: bytes) -> None:
        """Keep a fatal error that the coordinator writes; anything else on its stdout goes to stderr."""
        self._lines += data
        while (end := self._lines.find(b"\n")) >= 0:
            line = bytes(self._lines[: end + 1])
            del self._lines[: end + 1]
            report = read_report(line)
            if report is not None and report.error is not None:
                self._coordinator_error = report.error
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
        del self._lines[:-MAX_LINE_BYTES]

    def _coordinator_ended(self, code: int, number: int) -> None:
        error = self._coordinator_error
        if error is None and not self._stopping:
            how = f"signal {number}" if number else f"code {code}"
            pid = self._coordinator.pid if self._coordinator is not None else 0
            error = ErrorInfo(kind="engine_closed", text=f"the coordinator (pid {pid}) ended with {how}")
        self._end(error)

    # -------------------------------------------------------------------------------------------------- the end

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "supervisor task died", "exception": error, "task": task})
            self._fail(f"a task of the supervisor died: {error!r}")

    def _fail(self, text: str) -> None:
        if not self._stopping:
            log.error(text)
            self._end(ErrorInfo(kind="engine_closed", text=text))

    def _end(self, error: ErrorInfo | None) -> None:
        if not self._stop.is_set():
            self._error = error
            self._stop.set()

    async def _stop_all(self) -> None:
        """End what is owned: politely, then by SIGTERM, then by SIGKILL, within 3 s in all."""
        self._stopping = True
        coordinator, ranks = self._coordinator, self._ranks
        self._say(Stopping(reason="the owner of the engine is gone or closes it", error=self._error))
        if coordinator is not None:
            # The fatal error must arrive before the lifeline ends, which would end the coordinator without it.
            if self._error is not None:
                await coordinator.wait(GRACE_S / 2)
            coordinator.close_lifeline()
            if not await coordinator.wait(GRACE_S):
                coordinator.signal(signal.SIGTERM)
        if ranks is not None:
            await self._stop_ranks(ranks)
        if coordinator is not None:
            if not await coordinator.wait(TERM_S / 2):
                coordinator.signal(signal.SIGKILL)
            await coordinator.wait(KILL_S)

    async def _stop_ranks(self, ranks: RankProcesses) -> None:
        if self._error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S / 2):
                    await ranks.no_workers.wait()
        ranks.close()
        if not await ranks.wait(TERM_S):
            ranks.kill_all(signal.SIGTERM)
        await ranks.wait(TERM_S / 2)
        ranks.kill_all(signal.SIGKILL)
        await ranks.wait(KILL_S)

    def _tell(self, report: Report) -> None:
        """Write a line to the owner; an owner that is gone reads nothing."""
        try:
            os.write(1, encode_line(report))
        except (BrokenPipeError, BlockingIOError):
            return


async def _supervise(order: Order) -> int:
    return await Supervisor(order).run()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr("supervisor")
    try:
        order = read_order(0)
    except ProtocolError as error:
        log.critical(error.text)
        return 2
    return asyncio.run(_supervise(order))


if __name__ == "__main__":
    sys.exit(main())
