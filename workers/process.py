"""A worker process from its first instruction to its last.

The control thread starts before torch is imported, so that the lifeline is watched and the coordinator greeted from
the beginning. Whatever happens, the process ends through :meth:`Control.finish`, which flushes with a deadline and
leaves without running destructors: those of a process group wait for peers that may be gone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import uuid
from pathlib import Path

from drumline.protocol.errors import DrumlineError
from drumline.protocol.messages import Fault
from drumline.workers import lifeline
from drumline.workers.control import Control
from drumline.workers.faults import describe
from drumline.workers.identity import Identity
from drumline.workers.signals import take_signals

log = logging.getLogger(__name__)

# The control thread must get the interpreter within a fraction of a beat while the main thread prepares a step.
SWITCH_INTERVAL_S = 0.0005
_PR_SET_NAME = 15


def start_worker(rank: int, endpoint: str, token: str, lifeline_fd: int | None, token_file: Path | None = None) -> int:
    """Be the worker of ``rank``. Call on the main thread of a fresh process; ends the process.

    Without a lifeline it ends with the connection to its coordinator, and before it has one with ``token_file``.
    """
    _start_log(rank)
    watched = None if lifeline_fd is None else lifeline.arm(lifeline_fd)
    _set_process_name(f"drumline:r{rank}")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    control = Control(Identity(rank, uuid.uuid4().hex, token), endpoint, watched, take_signals(), token_file)
    control.start()
    try:
        from drumline.workers.worker import Worker
        from drumline.workers.worker_class import worker_class

        cls: type[Worker] = Worker
        config = control.await_config()
        if config is not None:  # else the engine ends already, and the main thread is told so in its turn
            cls = worker_class(Worker, config.worker_cls, config.worker_extension_cls)
        code = cls(control).run()
    except BaseException as error:
        if isinstance(error, DrumlineError):
            log.critical("the main thread failed: %s", error.text)
        else:
            log.critical("the main thread failed", exc_info=error)
        at = control.progress.position
        control.send(Fault(at.term, at.epoch, rank, describe(error, control.identity, at)))
        code = 1
    control.finish(code)
    return code


def _start_log(rank: int) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=_log_level(),
        format=f"%(asctime)s drumline:r{rank} %(levelname)s %(message)s",
        force=True,
    )
    logging.raiseExceptions = False  # a reader of stderr that is gone is no reason to stop


def _log_level() -> str:
    """DRUMLINE_LOG_LEVEL, or WARNING: what goes well is told to the coordinator, not to the terminal."""
    asked = os.environ.get("DRUMLINE_LOG_LEVEL", "").upper()
    return asked if asked in logging.getLevelNamesMapping() else "WARNING"


def _set_process_name(name: str) -> None:
    """What ps and top show. At most 15 bytes count."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
