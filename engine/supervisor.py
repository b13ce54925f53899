"""The process that owns all others of an engine: ``python -m drumline.engine.supervisor``.

It reads one :class:`~drumline.engine.launch.order.Order` from stdin, starts the coordinator and what starts the ranks
(:mod:`~drumline.engine.launch.rank_processes`), starts and kills workers as the coordinator asks, and reports every
exit at once. A coordinator or forkserver that dies is followed by another one, while the workers live on. Its stdin is
its lifeline: when it ends, or SIGTERM comes, or the coordinator says that the engine ends, everything it owns ends
within 3 s and the runtime directory is removed. A fatal error goes to the owner as a JSON line on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time

from drumline.engine.launch.coordinator_keeper import CoordinatorKeeper
from drumline.engine.launch.order import Order, Report, encode_line, log_to_stderr, read_order, remove_runtime_dir
from drumline.engine.launch.owned_process import has_ended, watch_owner
from drumline.engine.launch.rank_processes import RankProcesses, rank_processes
from drumline.engine.launch.roster import Roster
from drumline.engine.launch.subreaper import become_subreaper, reap_orphans
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import Beat, Exited, Kill, Notice, Spawn, Spawned, Stopping, ToSupervisor

log = logging.getLogger(__name__)

BEAT_S = 1.0
OWNER_S = 0.05
"""How long a process that dies may be there after its files are closed."""
GRACE_S = 1.0
"""How long coordinator and workers may take to end by themselves."""
TERM_S = 0.6
"""How long they may take after that, once told by signal, before they are killed."""
KILL_S = 0.8
ORPHANS_EVERY = 10
"""Beats between two looks at what the dead have left behind."""


class Supervisor:
    """Owns the coordinator and the workers of this host from :meth:`run` on."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._error: ErrorInfo | None = None
        self._owner_died = False
        self._stopping = False
        self._started = False
        self._roster = Roster()
        self._ranks: RankProcesses | None = None
        self._keeper = CoordinatorKeeper(
            self._loop,
            order,
            self._roster,
            on_message=self._take,
            on_started=self._coordinator_started,
            on_end=self._end,
        )

    async def run(self) -> int:
        """Run until the owner is gone or something fatal happens. Returns the exit code: 1 after an error."""
        watch_owner(self._loop, 0, self._order.owner_pid, self._owner_gone)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._end, None)
        beating: asyncio.Task[None] | None = None
        try:
            try:
                self._start()
            except OSError as error:
                self._fail(f"a process cannot be started: {error}")
            beating = self._loop.create_task(self._beat(), name="beat")
            beating.add_done_callback(self._task_ended)
            await self._stop.wait()
        finally:
            try:
                await self._stop_all()
            finally:
                if beating is not None:
                    beating.cancel()
                    await asyncio.gather(beating, return_exceptions=True)
                await self._keeper.close()
                remove_runtime_dir(self._order.runtime_dir)
        self._tell(Report("stopped") if self._error is None else Report("failed", os.getpid(), self._error))
        return 0 if self._error is None else 1

    def _start(self) -> None:
        become_subreaper()
        # What starts the ranks first: importing torch is what a start waits for.
        self._ranks = rank_processes(
            self._loop,
            self._order.config.parallel,
            self._order.worker_endpoint,
            on_spawned=self._worker_spawned,
            on_exited=self._worker_exited,
            on_lost=self._fail,
            import_path=self._order.import_path,
            restart_limit=self._order.config.faults.restart_limit,
        )
        self._keeper.start()

    def _coordinator_started(self, pid: int) -> None:
        self._tell(Report("restarted" if self._started else "started", pid or os.getppid()))
        self._started = True

    # ------------------------------------------------------------------------------------------- the coordinator asks

    def _take(self, message: ToSupervisor) -> None:
        if isinstance(message, Spawn):
            if self._ranks is not None and not self._stopping:
                self._roster.ordered(message.rank, message.token)
                self._ranks.spawn(message.rank, self._order.worker_endpoint, message.token)
        elif isinstance(message, Kill):
            if self._ranks is not None and self._roster.is_process_of(message.rank, message.pid):
                self._ranks.kill(message.pid, signal.SIGKILL)
        elif isinstance(message, Notice):
            log.info("%s: %s", message.kind, message.text)
        elif isinstance(message, Stopping):
            if self._keeper.process is None:
                self._end(message.error)
            else:
                # It ends by itself; its exit is awaited for the grace period, by the stop.
                self._loop.call_later(GRACE_S, self._end, message.error)

    def _worker_spawned(self, message: Spawned) -> None:
        if self._roster.spawned(message):
            self._keeper.say(message)
        elif self._ranks is not None:
            self._ranks.kill(message.pid, signal.SIGKILL)

    def _worker_exited(self, message: Exited) -> None:
        if self._roster.exited(message):
            self._keeper.say(message)

    async def _beat(self) -> None:
        last, turns = time.monotonic(), 0
        while True:
            self._keeper.say(Beat(os.getpid()))
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            # Time in which this process did not run is not the coordinator's.
            self._keeper.tick(min(now - last, 2 * BEAT_S))
            last, turns = now, turns + 1
            if turns % ORPHANS_EVERY == 0:
                process = self._keeper.process
                known = self._ranks.pids if self._ranks is not None else set()
                reap_orphans(known | ({process.pid} if process is not None else set()))

    # -------------------------------------------------------------------------------------------------- the end

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "supervisor task died", "exception": error, "task": task})
            self._fail(f"a task of the supervisor died: {error!r}")

    def _fail(self, text: str) -> None:
        if not self._stopping:
            log.error(text)
            self._end(ErrorInfo(kind="engine_closed", text=text))

    def _owner_gone(self) -> None:
        """Whoever closes the engine lives on and waits. Of one that has died, its end is seen a moment after that of
        its pipe, and the journal is left as it is: what it holds is for the next engine on its path."""
        self._loop.call_later(OWNER_S, self._end_as_owner)

    def _end_as_owner(self) -> None:
        owner = self._order.owner_pid
        self._owner_died = has_ended(owner)
        text = f"the app (pid {owner}) is gone"
        self._end(ErrorInfo(kind="engine_closed", text=text) if self._owner_died else None)

    def _end(self, error: ErrorInfo | None) -> None:
        if not self._stop.is_set():
            self._error = error
            self._stop.set()

    async def _stop_all(self) -> None:
        """End what is owned: politely, then by SIGTERM, then by SIGKILL, within 3 s in all."""
        self._stopping = True
        self._keeper.stop()
        coordinator, ranks = self._keeper.process, self._ranks
        self._keeper.say(Stopping(reason="the owner of the engine is gone or closes it", error=self._error))
        if coordinator is not None:
            # The fatal error must arrive before the lifeline ends, which would end the coordinator without it. Of the
            # end of the app nobody is left to be told.
            if self._error is not None and not self._owner_died:
                await coordinator.wait(GRACE_S / 2)
            coordinator.close_lifeline()
            if not await coordinator.wait(GRACE_S):
                coordinator.signal(signal.SIGTERM)
        if ranks is not None:
            # One that is stuck has not told its ranks.
            told = coordinator is None or coordinator.exited.is_set()
            await self._stop_ranks(ranks, told and (self._error is None or self._owner_died))
        if coordinator is not None:
            if not await coordinator.wait(TERM_S / 2):
                coordinator.signal(signal.SIGKILL)
            await coordinator.wait(KILL_S)

    async def _stop_ranks(self, ranks: RankProcesses, told: bool) -> None:
        if told:
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
