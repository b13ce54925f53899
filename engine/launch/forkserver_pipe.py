"""The supervisor's end of the forkserver: commands down its stdin, reports up its stdout.

Frames are a 4-byte big-endian length, then msgpack: ``{"spawn": [rank, endpoint, token]}``, ``{"kill": [pid,
signal]}`` down; ``{"ready": pid}``, ``{"spawned": [rank, pid]}``, ``{"exited": [rank, pid, code, signal,
stderr_tail]}`` up.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from drumline.engine.launch.owned_process import OwnedProcess
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Exited, Spawned

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


class Forkserver:
    """The forkserver process and its workers. The callbacks run in the loop.

    ``on_lost(text)``: it ended or broke its protocol, without having been closed. ``import_path``: what comes first in
    the workers' ``sys.path``.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_spawned: Callable[[Spawned], None],
        on_exited: Callable[[Exited], None],
        on_lost: Callable[[str], None],
        import_path: Sequence[str] = (),
    ) -> None:
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._on_lost = on_lost
        self._reader = ReportReader()
        self._closing = False
        self.workers: dict[int, int] = {}
        self.no_workers = asyncio.Event()
        self.no_workers.set()
        # Workers hold the read end; the write end is this process's alone, so that its death is theirs.
        read_end, self._lifeline = os.pipe()
        try:
            self.process = OwnedProcess(
                loop,
                "drumline.workers.forkserver",
                ["--lifeline-fd", str(read_end), *(f"--import-path={entry}" for entry in import_path)],
                on_output=self._output,
                on_exit=self._ended,
                pass_fds=(read_end,),
            )
        finally:
            os.close(read_end)

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Start a worker; it is reported by ``on_spawned``."""
        self._command({"spawn": (rank, endpoint, token)})

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker; one that has ended already is left alone."""
        if pid in self.workers:
            self._command({"kill": (pid, number)})

    def _command(self, command: dict[str, tuple[int, str, str]] | dict[str, tuple[int, int]]) -> None:
        body = msgspec.msgpack.encode(command)
        if not self.process.write(_LENGTH.pack(len(body)) + body) and not self._closing:
            self._on_lost(f"the forkserver (pid {self.process.pid}) takes no commands")

    def close(self) -> None:
        """End all workers and the forkserver, at once."""
        self._closing = True
        self.process.close_lifeline()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def kill_all(self, number: int) -> None:
        """Signal the forkserver and every worker directly, without its help."""
        self._closing = True
        self.process.signal(number)
        for pid in self.workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def wait(self, timeout: float) -> bool:
        """Whether the forkserver has ended within ``timeout`` seconds; its workers end before it does."""
        return await self.process.wait(timeout)

    def _output(self, data: bytes) -> None:
        try:
            reports = self._reader.feed(data)
        except ProtocolError as error:
            if not self._closing:
                self._on_lost(error.text)
            return
        for report in reports:
            if report.spawned is not None:
                rank, pid = report.spawned
                self.workers[pid] = rank
                self.no_workers.clear()
                self._on_spawned(Spawned(rank, pid))
            elif report.exited is not None:
                rank, pid, code, number, tail = report.exited
                self.workers.pop(pid, None)
                if not self.workers:
                    self.no_workers.set()
                self._on_exited(Exited(rank, pid, code, number, tail))

    def _ended(self, code: int, number: int) -> None:
        if not self._closing:
            how = f"signal {number}" if number else f"code {code}"
            self._on_lost(f"the forkserver (pid {self.process.pid}) ended with {how}")
