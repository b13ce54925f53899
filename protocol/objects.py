"""The objects that groups exchange, as bytes: msgspec's msgpack, bounded in size."""

from __future__ import annotations

from typing import Any

import msgspec

from drumline.protocol.errors import ProtocolError

MAX_OBJECT_BYTES = 8 << 20


def encode_object(value: Any) -> bytes:
    """``value`` as msgpack. Raises ProtocolError for what msgspec does not carry and for more than 8 MiB."""
    try:
        raw = msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"an object that a group does not carry: {error}") from error
    if len(raw) > MAX_OBJECT_BYTES:
        raise ProtocolError(f"an object of {len(raw)} bytes for a group; the limit is {MAX_OBJECT_BYTES}")
    return raw


def decode_object(raw: bytes, as_type: Any) -> Any:
    """The object in ``raw``, as ``as_type``. Raises ProtocolError for one that is something else."""
    try:
        return msgspec.msgpack.decode(raw, type=as_type)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"an object of a group that does not decode: {error}") from error
