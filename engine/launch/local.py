"""An engine on this machine, for the app that starts it: its private folder, its supervisor, and its end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from drumline.engine.config import EngineConfig
from drumline.engine.first_placement import with_own_file
from drumline.engine.launch.external import ExternalLaunch, external_launch
from drumline.engine.launch.order import (
    MAX_LINE_BYTES,
    RUNTIME_PREFIX,
    Order,
    encode_line,
    read_report,
    remove_runtime_dir,
)
from drumline.engine.launch.owned_process import OwnedProcess, how_ended
from drumline.engine.launch.ports import check_ports, worker_endpoint
from drumline.engine.resolve import ResolvedConfig, resolve
from drumline.protocol.endpoints import MAX_IPC_PATH_BYTES
from drumline.protocol.errors import EngineClosed, ErrorInfo, InvalidConfig, StartFailed
from drumline.protocol.messages import Event

if TYPE_CHECKING:
    from drumline.engine.launch.inline import InlineCoordinator

KILL_S = 2.0
_LONGEST_NAME = "/worker.sock"


class LocalEngine:
    """The processes of one engine. ``failed`` gets the error when they end without having been closed.

    ``client_endpoint``: where clients connect. ``runtime_dir``: the private folder of the sockets, gone after the end.
    ``launch``: how the ranks that are not started here are started, None when all are.
    """

    def __init__(self, order: Order) -> None:
        loop = asyncio.get_running_loop()
        self._order = order
        self.client_endpoint = order.client_endpoint
        self.runtime_dir = order.runtime_dir
        self.launch: ExternalLaunch | None = external_launch(order)
        self.failed: asyncio.Future[ErrorInfo] = loop.create_future()
        #: Of the coordinator of the moment; 0 before one is started, this process's own with ``inline``.
        self.coordinator_pid = 0
        self._lines = bytearray()
        self._error: ErrorInfo | None = None
        self._closing = False
        self._inline: InlineCoordinator | None = None
        self._supervisor: OwnedProcess | None = None

    @property
    def supervisor_pid(self) -> int:
        """0 before it is started."""
        return self._supervisor.pid if self._supervisor is not None else 0

    def start(self, resolved: ResolvedConfig) -> None:
        """Start the supervisor, and with ``inline`` the coordinator in this loop."""
        if not self._order.with_coordinator:
            # Imported only here: an app whose coordinator is a process of its own needs none of it.
            from drumline.engine.launch.inline import InlineCoordinator

            self._inline = InlineCoordinator(self._order, resolved, self._fail)
        try:
            self._supervisor = OwnedProcess(
                asyncio.get_running_loop(),
                "drumline.engine.supervisor",
                [],
                on_output=self._output,
                on_exit=self._ended,
                # Ctrl-C in a terminal goes to the foreground group: it is the app that decides what it means.
                new_session=True,
                first_line=encode_line(self._order),
            )
        except OSError as error:
            raise StartFailed(f"the supervisor process cannot be started: {error}") from error

    async def close(self, timeout: float = 5.0) -> None:
        """End everything and wait for it, ``timeout`` seconds at most; then kill. Idempotent."""
        self._closing = True
        try:
            if self._inline is not None:
                await self._inline.close("the app closes the engine")
            supervisor = self._supervisor
            if supervisor is not None:
                supervisor.close_lifeline()
                if not await supervisor.wait(timeout):
                    # What it owns is tied to it by lifelines.
                    supervisor.signal(signal.SIGKILL)
                    await supervisor.wait(KILL_S)
        finally:
            if self._supervisor is not None:
                self._supervisor.close_lifeline()
            remove_runtime_dir(self.runtime_dir)
            if not self.failed.done():
                self.failed.cancel()

    def _output(self, data: bytes) -> None:
        self._lines += data
        while (end := self._lines.find(b"\n")) >= 0:
            report = read_report(bytes(self._lines[:end]))
            del self._lines[: end + 1]
            if report is None:
                continue
            if report.error is not None:
                self._error = report.error
            elif report.event in ("started", "restarted"):
                self.coordinator_pid = report.pid
        del self._lines[:-MAX_LINE_BYTES]

    def _ended(self, code: int, number: int) -> None:
        error = self._error
        if error is None:
            text = f"the supervisor (pid {self.supervisor_pid}) ended with {how_ended(code, number)}"
            error = EngineClosed(text).info
        remove_runtime_dir(self.runtime_dir)
        if self._inline is not None:
            self._inline.owner_gone(error)
        self._fail(error)

    def _fail(self, error: ErrorInfo) -> None:
        if not self._closing and not self.failed.done():
            self.failed.set_result(error)


async def start_local(config: EngineConfig, on_event: Callable[[Event], None] | None = None) -> LocalEngine:
    """Check ``config`` against the model folder and start the processes; readiness is told by the client handshake.

    Raises InvalidConfig before anything is started, StartFailed when the supervisor cannot be.
    """
    resolved = await asyncio.to_thread(resolve, config)
    check_ports(config.parallel, resolved.groups)
    runtime_dir = make_runtime_dir()
    try:
        engine = LocalEngine(
            Order(
                config=with_own_file(config, resolved.placements.get(0), runtime_dir),
                runtime_dir=runtime_dir,
                client_endpoint=f"ipc://{runtime_dir}/client.sock",
                worker_endpoint=worker_endpoint(config.parallel, runtime_dir),
                supervisor_token=secrets.token_urlsafe(24),
                owner_pid=os.getpid(),
                with_coordinator=not config.inline,
                import_path=import_path(),
            )
        )
    except BaseException:
        remove_runtime_dir(runtime_dir)
        raise
    try:
        engine.start(resolved)
    except BaseException:
        await engine.close()
        raise
    if on_event is not None:
        on_event(Event("starting", f"supervisor (pid {engine.supervisor_pid}) is started"))
    return engine


def import_path() -> tuple[str, ...]:
    """The folders and archives of this process's ``sys.path``, absolute: another process may stand elsewhere."""
    entries = [str(Path(os.fsdecode(entry)).absolute()) for entry in sys.path]
    return tuple(dict.fromkeys(entry for entry in entries if _is_text(entry)))


def make_runtime_dir() -> str:
    """A new private folder whose path leaves room for a socket's name. Raises InvalidConfig when there is none."""
    tried: list[str] = []
    for base in (os.environ.get("XDG_RUNTIME_DIR"), _temporary(), "/tmp"):
        if not base or not Path(base).is_dir() or not os.access(base, os.W_OK | os.X_OK):
            continue
        base = str(Path(base).absolute())
        # mkdtemp adds eight characters to the prefix.
        length = len(os.fsencode(base)) + 1 + len(RUNTIME_PREFIX) + 8 + len(_LONGEST_NAME)
        if length > MAX_IPC_PATH_BYTES:
            tried.append(f"{base} ({length} bytes)")
        elif not _is_text(base):
            tried.append(f"{base!a} (not UTF-8)")
        else:
            try:
                return _made(base)
            except OSError as error:
                tried.append(f"{base} ({error.strerror})")
    raise InvalidConfig(
        "TMPDIR",
        ", ".join(tried) or "no writable folder",
        f"a writable folder in which a socket's path has at most {MAX_IPC_PATH_BYTES} bytes",
    )


def _temporary() -> str | None:
    """The folder for temporary files; None when Python can write to none of those that it tries."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return None


def _made(base: str) -> str:
    """A private folder in ``base`` in which a socket can be made: a full disk may have room for the one alone."""
    path = tempfile.mkdtemp(prefix=RUNTIME_PREFIX, dir=base)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{path}/probe")
        Path(f"{path}/probe").unlink()
    except BaseException:
        remove_runtime_dir(path)
        raise
    return path


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
