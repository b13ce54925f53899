"""Frames on the pipes between the forkserver and its owner: a 4-byte big-endian length, then msgpack.

Commands are maps with one key: ``{"spawn": [rank, endpoint, token]}`` or ``{"kill": [pid, signal]}``. Reports are
``{"ready": pid}``, ``{"spawned": [rank, pid]}`` and ``{"exited": [rank, pid, code, signal, stderr_tail]}``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from drumline.protocol.errors import ProtocolError

MAX_FRAME_BYTES = 64 * 1024

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


class Command(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One order of the owner. Exactly one field is set."""

    spawn: tuple[int, str, str] | None = None
    kill: tuple[int, int] | None = None


_decoder = msgspec.msgpack.Decoder(Command)


def pack(report: dict[str, object]) -> bytes:
    """The bytes of one frame."""
    body = _encoder.encode(report)
    return _LENGTH.pack(len(body)) + body


class CommandReader:
    """Cuts a byte stream into commands."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Command]:
        """Every command that is whole once ``data`` has been appended.

        Raises:
            ProtocolError: a frame longer than 64 KiB, or one that is no command. The stream is of no use then.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"forkserver command of {length} bytes; at most {MAX_FRAME_BYTES} are valid")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _decode(body)


def _decode(body: bytes) -> Command:
    try:
        command = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"forkserver command that does not decode: {error}") from error
    if (command.spawn is None) == (command.kill is None):
        raise ProtocolError("forkserver command must hold exactly one of: spawn, kill")
    return command
