"""What the owner of a process tells it: one JSON line on its stdin, which then stays open as the lifeline.

The pipe is private to the two processes, so launch tokens may travel in it; they never stand on a command line. Reports
go the other way as JSON lines on stdout.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import msgspec

from drumline.engine.config import EngineConfig
from drumline.protocol.errors import ErrorInfo, ProtocolError

MAX_LINE_BYTES = 1 << 20
RUNTIME_PREFIX = "drumline-"
MAX_TEXT_CHARACTERS = 2_000
MAX_TRACE_CHARACTERS = 8_000


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What supervisor and coordinator must know. ``supervisor_token`` is what the supervisor shows in its Hello.

    ``owner_pid``: the process whose death ends everything. ``with_coordinator``: False when the coordinator runs in the
    app (inline), so that the supervisor starts only workers. ``import_path``: the app's ``sys.path``, so that ranks can
    import the classes that the app names.
    """

    config: EngineConfig
    runtime_dir: str
    client_endpoint: str
    worker_endpoint: str
    supervisor_token: str
    owner_pid: int
    with_coordinator: bool = True
    term: int = 1
    import_path: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """A line on stdout. ``event``: started or restarted (the coordinator, ``pid``), failed (with ``error``) or
    stopped."""

    event: str
    pid: int = 0
    error: ErrorInfo | None = None


_order_decoder = msgspec.json.Decoder(Order)
_report_decoder = msgspec.json.Decoder(Report)


def encode_line(value: Order | Report) -> bytes:
    """One line. The texts of a report are cut: it must fit into a pipe whose reader sleeps."""
    if isinstance(value, Report) and value.error is not None:
        error = value.error
        error = msgspec.structs.replace(
            error,
            text=error.text[:MAX_TEXT_CHARACTERS],
            traceback=error.traceback[-MAX_TRACE_CHARACTERS:],
            found=error.found[:MAX_TEXT_CHARACTERS],
            valid=error.valid[:MAX_TEXT_CHARACTERS],
        )
        value = msgspec.structs.replace(value, error=error)
    return msgspec.json.encode(value) + b"\n"


def log_to_stderr(process: str) -> None:
    """How a process of the engine logs: to stderr, with its name; a reader that is gone is no reason to stop."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s drumline:{process} %(levelname)s %(message)s"
    )
    logging.raiseExceptions = False


def read_order(fd: int) -> Order:
    """Read the line from ``fd``; the owner writes nothing after it.

    Raises ProtocolError for a line that is too long, cut short or no order.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(fd, 1 << 16)
        if not data:
            raise ProtocolError(f"stdin ended after {len(line)} bytes; one JSON line with the order is expected")
        line += data
        if len(line) > MAX_LINE_BYTES:
            raise ProtocolError(f"an order of more than {MAX_LINE_BYTES} bytes on stdin")
    try:
        return _order_decoder.decode(bytes(line))
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"stdin holds no valid order: {error}") from error


def read_report(line: bytes) -> Report | None:
    """A line of stdout as a report, None when it is something else (a library that prints)."""
    try:
        return _report_decoder.decode(line)
    except msgspec.MsgspecError:
        return None


def remove_runtime_dir(path: str) -> None:
    """Remove the private folder of an engine. Anything that does not look like one is left alone."""
    folder = Path(path)
    try:
        found = folder.lstat()
    except OSError:
        return
    if folder.name.startswith(RUNTIME_PREFIX) and found.st_uid == os.getuid() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
