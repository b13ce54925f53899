"""What the coordinator and the planner's process say to each other: a 4-byte big-endian length, then one message."""

from __future__ import annotations

import struct

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ProtocolError

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct(">I")

# Arrays stand in the message: a pipe gains nothing from frames of their own.
requests: Codec[PlanRequest] = Codec(PlanRequest, max_frames=1, max_frame_bytes=MAX_FRAME_BYTES)
plans: Codec[PlacementPlan] = Codec(PlacementPlan, max_frames=1, max_frame_bytes=MAX_FRAME_BYTES)


def pack_request(request: PlanRequest) -> bytes:
    """A request as it travels. Raises ProtocolError for one over 64 MiB."""
    return _pack(bytes(requests.encode(request)[0]))


def pack_plan(plan: PlacementPlan) -> bytes:
    """A plan as it travels. Raises ProtocolError for one over 64 MiB."""
    return _pack(bytes(plans.encode(plan)[0]))


def _pack(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def no_plan(request: PlanRequest, error: str) -> PlacementPlan:
    """The answer that nothing moves, and why."""
    return PlacementPlan(request.number, request.placement, error=error)


class FrameReader:
    """Cuts a byte stream into messages. Holds at most one frame and what came with its end."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole with ``data``. Raises ProtocolError for a length over the limit."""
        self._buffer += data
        whole: list[bytes] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            whole.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return whole
