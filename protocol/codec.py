"""Messages to frames and back: msgpack for the message, frames of their own for large arrays.

The first frame is msgpack. A small array stands in it as an extension value; a larger one becomes a frame of its own,
handed over as a view of the caller's memory. Decoding trusts nothing: the number and size of frames are checked first,
then msgspec checks every value against its type, and dtype, dimensions and length of every array against its
annotation. msgspec grows containers as their elements arrive, so a header that claims 2**32 of them allocates nothing;
a test holds it to that. The layout of the bytes is in docs/wire-format.md.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, get_args

import msgspec
import numpy as np
from msgspec.msgpack import Ext

from drumline.protocol.errors import ProtocolError

T = TypeVar("T")
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Frame: TypeAlias = bytes | memoryview

# Arrays up to this many bytes stay in the first frame: below it, a frame costs more than the copy.
INLINE_BYTES = 2048
MAX_FRAMES = 64
MAX_FRAME_BYTES = 64 << 20
MAX_DIMENSIONS = 2

# Extension codes. 1 and 2 are vectors, 3 and 4 carry the header below.
EXT_I32 = 1
EXT_F32 = 2
EXT_SHAPED = 3
EXT_FRAME = 4
_HEADER = struct.Struct("<BB")

_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)
_DTYPES = {EXT_I32: _INT32, EXT_F32: _FLOAT32}


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array


_EMPTY_EXT = {EXT_I32: Ext(EXT_I32, b""), EXT_F32: Ext(EXT_F32, b"")}
_EMPTY_ARRAY = {code: _read_only(np.empty(0, dtype)) for code, dtype in _DTYPES.items()}

DecodeReason: TypeAlias = Literal["malformed", "oversized", "frames"]


class DecodeError(ProtocolError):
    """Frames that are not a message of the union. ``reason`` is malformed, oversized or frames (wrong number)."""

    def __init__(self, reason: DecodeReason, text: str) -> None:
        super().__init__(text)
        self.reason: DecodeReason = reason


class _Expected(msgspec.Struct, frozen=True, gc=False):
    """What the annotation of an array field asks for. Keeps the annotation, whose id is the key of the memo."""

    annotation: object
    code: int
    ndim: int


class Codec(Generic[T]):
    """Encodes and decodes the messages of one union, ``union`` being e.g. ``messages.ToWorker``.

    Made once and kept: building the decoder walks every type. Safe to use from several threads. ``max_head_bytes``
    limits the first frame of what is decoded (default: as the others). Objects decoded from it can take up to some 70
    times its bytes, arrays in frames of their own take nothing more, so a side that strangers write to does well to set
    it low.
    """

    def __init__(
        self,
        union: Any,
        max_frames: int = MAX_FRAMES,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_head_bytes: int | None = None,
    ) -> None:
        self.max_frames = max_frames
        self.max_frame_bytes = max_frame_bytes
        self.max_head_bytes = max_frame_bytes if max_head_bytes is None else max_head_bytes
        if min(max_frames, max_frame_bytes, self.max_head_bytes) < 1:
            raise ValueError(f"limits must be at least 1: {max_frames}, {max_frame_bytes}, {self.max_head_bytes}")
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._encode_array)
        self._decoder = msgspec.msgpack.Decoder(union, dec_hook=self._decode_array)
        # Frames beside the first, by thread, of the call that runs there. Empty for nearly every message.
        self._outgoing: dict[int, list[Frame]] = {}
        self._incoming: dict[int, Iterator[Frame]] = {}
        self._expected: dict[int, _Expected] = {}

    def encode(self, message: T) -> list[Frame]:
        """The frames of ``message``. Frames after the first are views of its arrays: send them before changing those.

        Raises ProtocolError for a message over the limits, TypeError for an array that is not int32 or float32.
        """
        try:
            head = self._encoder.encode(message)
        except BaseException:
            self._outgoing.pop(get_ident(), None)
            raise
        frames: list[Frame] = [head]
        if self._outgoing:
            frames += self._outgoing.pop(get_ident(), ())
        # The limit of the first frame is this side's; what is encoded here is decoded by another.
        over = self._oversized(frames, self.max_frame_bytes)
        if over is not None:
            raise ProtocolError(f"{type(message).__name__} makes {over}")
        return frames

    def decode(self, frames: Sequence[Frame]) -> T:
        """The message in ``frames``; arrays are read-only and may share their memory. Raises DecodeError only."""
        if not 1 <= len(frames) <= self.max_frames:
            raise DecodeError("frames", f"{len(frames)} frames; 1 to {self.max_frames} are allowed")
        over = self._oversized(frames, self.max_head_bytes)
        if over is not None:
            raise DecodeError("oversized", over)
        try:
            if len(frames) == 1:
                return cast(T, self._decoder.decode(frames[0]))
            return self._decode_with_frames(frames)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise DecodeError("malformed", f"a frame that does not decode: {error}") from error

    def _oversized(self, frames: Sequence[Frame], limit: int) -> str | None:
        for frame in frames:
            if len(frame) > limit:
                return f"a frame of {len(frame)} bytes; the limit is {limit}"
            limit = self.max_frame_bytes
        return None

    def _decode_with_frames(self, frames: Sequence[Frame]) -> T:
        thread = get_ident()
        rest = iter(frames[1:])
        self._incoming[thread] = rest
        try:
            message = self._decoder.decode(frames[0])
        finally:
            del self._incoming[thread]
        surplus = sum(1 for _ in rest)
        if surplus:
            raise DecodeError("frames", f"{surplus} of {len(frames)} frames belong to no array of the message")
        return cast(T, message)

    def _encode_array(self, value: object) -> Ext:
        if type(value) is not np.ndarray:
            raise TypeError(f"a message cannot carry a value of type {type(value).__name__}")
        code = _code_of(value.dtype)
        size = value.nbytes
        if value.ndim == 1:
            if size == 0:
                return _EMPTY_EXT[code]
            if size <= INLINE_BYTES:
                return Ext(code, value.tobytes())
        if not 1 <= value.ndim <= MAX_DIMENSIONS:
            raise TypeError(f"a message cannot carry an array of {value.ndim} dimensions")
        header = _HEADER.pack(code, value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        pending = self._outgoing.setdefault(get_ident(), [])
        # With the allowed frames used up the rest goes inline: slower, never wrong.
        if size <= INLINE_BYTES or len(pending) >= self.max_frames - 1:
            return Ext(EXT_SHAPED, header + value.tobytes())
        pending.append(np.ascontiguousarray(value).data.cast("B"))
        return Ext(EXT_FRAME, header)

    def _decode_array(self, annotation: object, value: object) -> Array:
        expected = self._expected.get(id(annotation))
        if expected is None:
            expected = self._remember(annotation)
        if type(value) is not Ext:
            raise ValueError("an array field does not hold an array")
        data = cast(bytes, value.data)
        if value.code == expected.code and expected.ndim == 1:
            if not data:
                return _EMPTY_ARRAY[expected.code]
            # data is a bytes object of its own, so the array is aligned and cannot be written to.
            return np.frombuffer(data, _DTYPES[expected.code])
        if value.code not in (EXT_SHAPED, EXT_FRAME):
            raise ValueError(f"an array of extension {value.code} where {expected.code} is expected")
        return self._decode_shaped(expected, value.code, data)

    def _decode_shaped(self, expected: _Expected, place: int, data: bytes) -> Array:
        header_bytes = _HEADER.size + 4 * expected.ndim
        if len(data) < header_bytes:
            raise ValueError("the header of an array is cut short")
        code, ndim = _HEADER.unpack_from(data)
        if code != expected.code or ndim != expected.ndim:
            found = f"code {code} with {ndim} dimensions"
            raise ValueError(f"an array of {found} where code {expected.code} with {expected.ndim} is expected")
        shape = struct.unpack_from(f"<{ndim}I", data, _HEADER.size)
        payload: Frame = data[header_bytes:]
        if place == EXT_FRAME:
            if payload:
                raise ValueError("an array has data both inline and in a frame")
            payload = self._next_frame()
        dtype = _DTYPES[code]
        if len(payload) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(payload)} bytes for an array of shape {shape}")
        flat = np.frombuffer(payload, dtype) if len(payload) else np.empty(0, dtype)
        return _read_only(flat.reshape(shape))

    def _next_frame(self) -> Frame:
        frame = next(self._incoming.get(get_ident(), iter(())), None)
        if frame is None:
            raise ValueError("the frame of an array is missing")
        return frame

    def _remember(self, annotation: object) -> _Expected:
        shape, dtype = get_args(annotation)
        code = _code_of(np.dtype(get_args(dtype)[0]))
        expected = _Expected(annotation, code, 1 if shape is Any else len(get_args(shape)))
        self._expected[id(annotation)] = expected
        return expected


def _code_of(dtype: np.dtype[Any]) -> int:
    # Identity first: it holds for every array numpy makes itself and costs a third of a comparison.
    if dtype is _INT32 or dtype == _INT32:
        return EXT_I32
    if dtype is _FLOAT32 or dtype == _FLOAT32:
        return EXT_F32
    raise TypeError(f"a message carries int32 and float32 arrays, not {dtype}")


_DIGEST_ENCODER = msgspec.msgpack.Encoder(order="deterministic")


def config_digest(config: msgspec.Struct) -> str:
    """16 hex digits of the sha256 over the type's name, its field names and its values.

    Equal on two processes exactly when they mean the same configuration: the names are in it, because values that
    travel by position would hide a field that has changed its meaning.
    """
    kind = type(config)
    value = (kind.__name__, kind.__struct_fields__, config)
    return hashlib.sha256(_DIGEST_ENCODER.encode(value)).hexdigest()[:16]
