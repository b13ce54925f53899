"""Random messages, made from the annotations of the message types."""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from drumline.protocol.messages import Message

INTS = st.integers(-(1 << 63), (1 << 64) - 1)


@st.composite
def _arrays(draw: st.DrawFn, dtype: np.dtype[Any], ndim: int) -> np.ndarray[Any, Any]:
    # Lengths around the inline limit (512 elements) decide between inline and a frame.
    length = draw(st.one_of(st.integers(0, 6), st.integers(500, 530)))
    raw = draw(st.binary(min_size=8, max_size=8))
    data = np.frombuffer((raw * (length * 4 // 8 + 1))[: length * 4], dtype=dtype)
    if ndim == 1:
        return data
    columns = draw(st.integers(1, 3))
    return data[: length // columns * columns].reshape(-1, columns)


def of_annotation(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of one annotated field."""
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: INTS,
        str: st.text(max_size=12),
        bytes: st.binary(max_size=12),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
    }
    if annotation in simple:
        return simple[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is np.ndarray:
        dtype = np.dtype(typing.get_args(args[1])[0])
        return _arrays(dtype, 1 if args[0] is Any else len(typing.get_args(args[0])))
    if origin is tuple:
        return st.lists(of_annotation(args[0]), max_size=3).map(tuple)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(of_annotation(arg) for arg in args))
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return of_struct(annotation)
    raise TypeError(f"no strategy for {annotation!r}")


def of_struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: of_annotation(hints[field.name]) for field in msgspec.structs.fields(cls)})


def messages(*classes: type[Message]) -> st.SearchStrategy[Any]:
    return st.one_of(*(of_struct(cls) for cls in classes))
