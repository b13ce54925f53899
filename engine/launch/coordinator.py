"""The coordinator as a process of its own: ``python -m drumline.engine.launch.coordinator``, the order on stdin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

import uvloop

from drumline.engine.coordinator import Coordinator
from drumline.engine.launch.order import Order, Report, encode_line, log_to_stderr, read_order, remove_runtime_dir
from drumline.engine.launch.owned_process import watch_owner
from drumline.protocol.errors import DrumlineError, ErrorInfo

log = logging.getLogger(__name__)


async def serve(order: Order) -> int:
    """Run a coordinator as the process that it is. Returns the exit code."""
    loop = asyncio.get_running_loop()
    try:
        coordinator = Coordinator(order)
    except DrumlineError as error:
        _report(error.info)
        return 1
    watch_owner(loop, 0, order.owner_pid, coordinator.owner_gone)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, coordinator.end, f"the coordinator got {signal.Signals(number).name}", None)
    fatal = await coordinator.run()
    if fatal is not None:
        _report(fatal)
    return 0 if fatal is None else 1


def _report(error: ErrorInfo) -> None:
    """The supervisor reads this line; one that is gone reads nothing."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, encode_line(Report("failed", os.getpid(), error)))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr("coordinator")
    try:
        order = read_order(0)
    except DrumlineError as error:
        log.critical(error.text)
        return 2
    try:
        return uvloop.run(serve(order))
    finally:
        # The supervisor does this, or starts another coordinator there, unless it is the one that died.
        if os.getppid() != order.owner_pid:
            remove_runtime_dir(order.runtime_dir)


if __name__ == "__main__":
    sys.exit(main())
