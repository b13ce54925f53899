"""Objects and dictionaries of tensors as flat bytes, whose length the receiver does not know.

An object travels as a head of a fixed size, which begins with its length, and the rest where it does not fit. A
dictionary travels as an object, which says what there is, and then the bytes of all tensors in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.objects import MAX_OBJECT_BYTES

HEAD_BYTES = 1024
_LENGTH_BYTES = 8
_ROOM = HEAD_BYTES - _LENGTH_BYTES
_ALIGNMENT = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class TensorHead(msgspec.Struct, array_like=True, frozen=True):
    """A tensor of a dictionary, without its bytes. ``cuda``: it lies on the sender's device."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    cuda: bool


class DictHead(msgspec.Struct, array_like=True, frozen=True):
    """What a dictionary of tensors holds, in its order: ``names`` of all entries, the values that are no tensors."""

    names: list[str]
    tensors: list[TensorHead]
    values: dict[str, Any]


def cut(raw: bytes) -> list[Tensor]:
    """The head (HEAD_BYTES,) and, where ``raw`` does not fit it, the rest; both uint8."""
    head = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw[:_ROOM]
    parts = [torch.frombuffer(bytearray(head.ljust(HEAD_BYTES, b"\0")), dtype=torch.uint8)]
    if len(raw) > _ROOM:
        parts.append(torch.frombuffer(bytearray(raw[_ROOM:]), dtype=torch.uint8))
    return parts


def rest_of(head: Tensor) -> int:
    """How many bytes come after a head. Raises ProtocolError above ``MAX_OBJECT_BYTES``."""
    return max(0, _length(head) - _ROOM)


def join(head: Tensor, rest: Tensor | None) -> bytes:
    """The object of which :func:`cut` made these."""
    raw = head.numpy().tobytes()[_LENGTH_BYTES : _LENGTH_BYTES + _length(head)]
    return raw if rest is None else raw + rest.numpy().tobytes()


def _length(head: Tensor) -> int:
    length = int.from_bytes(head[:_LENGTH_BYTES].numpy().tobytes(), "little")
    if length > MAX_OBJECT_BYTES:
        raise ProtocolError(f"an object of {length} bytes from a group; the limit is {MAX_OBJECT_BYTES}")
    return length


def describe(tensors: Mapping[str, Any]) -> DictHead:
    """The head of a dictionary. Raises ProtocolError for a dtype that is not carried."""
    heads, values = [], {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            values[name] = value
            continue
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ProtocolError(f"tensors[{name!r}]: found dtype {dtype}; valid: {', '.join(_DTYPES)}")
        heads.append(TensorHead(name, dtype, tuple(value.shape), value.is_cuda))
    return DictHead(list(tensors), heads, values)


def dtype_of(head: TensorHead) -> torch.dtype:
    """Raises ProtocolError for a dtype that is not carried."""
    if head.dtype not in _DTYPES:
        raise ProtocolError(f"tensor {head.name!r} of dtype {head.dtype}; valid: {', '.join(_DTYPES)}")
    return _DTYPES[head.dtype]


def size_of(head: TensorHead) -> int:
    """The tensor's bytes. Raises ProtocolError for a shape that is none."""
    if any(length < 0 for length in head.shape):
        raise ProtocolError(f"tensor {head.name!r} of shape {list(head.shape)}")
    return math.prod(head.shape) * dtype_of(head).itemsize


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """uint8: the bytes of all tensors, each at a multiple of 64 bytes."""
    places = _places([tensor.nbytes for tensor in tensors])
    packed = torch.empty(places[-1], dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=False):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        packed[place : place + len(flat)] = flat
    return packed


def packed_bytes(heads: Sequence[TensorHead]) -> int:
    """How long :func:`pack` made them."""
    return _places([size_of(head) for head in heads])[-1]


def unpack(packed: Tensor, heads: Sequence[TensorHead]) -> list[Tensor]:
    """Views of ``packed``, one for each head."""
    sizes = [size_of(head) for head in heads]
    return [
        packed[place : place + size].view(dtype_of(head)).view(head.shape)
        for head, size, place in zip(heads, sizes, _places(sizes), strict=False)
    ]


def _places(sizes: Sequence[int]) -> list[int]:
    """Where each begins, and where the last ends."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return places
