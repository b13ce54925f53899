"""The supervisor's end of the forkserver: commands down its stdin, reports up its stdout.

Frames are a 4-byte big-endian length, then msgpack: ``{"spawn": [rank, endpoint, token]}``, ``{"kill": [pid,
signal]}`` down; ``{"ready": pid}``, ``{"spawned": [rank, pid]}``, ``{"exited": [rank, pid, code, signal,
stderr_tail]}`` up.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Sequence

import msgspec

from drumline.engine.launch.owned_process import OwnedProcess
from drumline.protocol.errors import ProtocolError

MODULE = "drumline.workers.forkserver"
MAX_FRAME_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")


class ForkserverReport(msgspec.Struct, frozen=True):
    """One report; exactly one field is set."""

    ready: int | None = None
    spawned: tuple[int, int] | None = None
    exited: tuple[int, int, int, int, str] | None = None


_decoder = msgspec.msgpack.Decoder(ForkserverReport)


class ReportReader:
    """Cuts a byte stream into reports."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[ForkserverReport]:
        """The reports that are whole with ``data``. Raises ProtocolError for what is none."""
        self._buffer += data
        reports: list[ForkserverReport] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"forkserver report of {length} bytes; at most {MAX_FRAME_BYTES} are valid")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                reports.append(_decoder.decode(bytes(self._buffer[_LENGTH.size : end])))
            except msgspec.MsgspecError as error:
                raise ProtocolError(f"forkserver report that does not decode: {error}") from error
            del self._buffer[:end]
        return reports


class ForkserverPipe:
    """One forkserver process. ``on_report`` gets its reports, ``on_broken`` why what it says is none,
    ``on_exit(code, signal)`` how it ended. ``lifeline``: the read end of the workers' lifeline, which stays open."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        lifeline: int,
        import_path: Sequence[str],
        *,
        on_report: Callable[[ForkserverReport], None],
        on_broken: Callable[[str], None],
        on_exit: Callable[[int, int], None],
    ) -> None:
        self._on_report = on_report
        self._on_broken = on_broken
        self._reader = ReportReader()
        self._broken = False
        self._ready_at: float | None = None
        self._process = OwnedProcess(
            loop,
            MODULE,
            ["--lifeline-fd", str(lifeline), *(f"--import-path={entry}" for entry in import_path)],
            on_output=self._output,
            on_exit=on_exit,
            pass_fds=(lifeline,),
        )
        self.pid = self._process.pid
        self.exited = self._process.exited

    @property
    def ready(self) -> bool:
        """Whether it has said that it takes commands."""
        return self._ready_at is not None

    def lived_s(self, now: float) -> float:
        """For how long it has taken commands."""
        return 0.0 if self._ready_at is None else now - self._ready_at

    def command(self, command: dict[str, tuple[int, str, str]]) -> bool:
        """Send a command; False when it takes none."""
        body = msgspec.msgpack.encode(command)
        return self._process.write(_LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        """Have it end, and its workers with it."""
        self._process.close_lifeline()

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        self._process.signal(number)

    def _output(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            reports = self._reader.feed(data)
        except ProtocolError as error:
            self._broken = True
            self._on_broken(error.text)
            return
        for report in reports:
            if report.ready is not None:
                self._ready_at = time.monotonic()
            self._on_report(report)
