"""Objects and dictionaries of tensors as bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drumline.protocol.errors import ProtocolError
from drumline.protocol.objects import decode_object, encode_object
from drumline.workers.groups import packed


@given(st.binary(max_size=4 * packed.HEAD_BYTES))
def test_what_was_cut_is_joined(raw: bytes) -> None:
    head, *rest = packed.cut(raw)
    assert head.shape == (packed.HEAD_BYTES,)
    assert packed.rest_of(head) == (len(rest[0]) if rest else 0)
    assert packed.join(head, rest[0] if rest else None) == raw


def test_a_head_that_claims_too_much_is_refused() -> None:
    head = torch.full((packed.HEAD_BYTES,), 255, dtype=torch.uint8)
    with pytest.raises(ProtocolError, match="the limit is 8388608"):
        packed.rest_of(head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_packed_tensors_come_back_in_shape(dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "strided": torch.arange(12).view(3, 4).t().to(dtype),
    }
    head = packed.describe(tensors)
    flat = packed.pack(list(tensors.values()))
    assert len(flat) == packed.packed_bytes(head.tensors)
    for found, sent in zip(packed.unpack(flat, head.tensors), tensors.values(), strict=True):
        assert found.dtype == sent.dtype
        assert torch.equal(found, sent)


def test_a_head_of_a_dictionary_survives_the_wire() -> None:
    tensors: dict[str, Any] = {"b": 3, "a": torch.zeros(2, 1, dtype=torch.int32), "c": [None, "x"]}
    head = packed.describe(tensors)
    assert decode_object(encode_object(head), packed.DictHead) == head
    assert head.names == ["b", "a", "c"]
    assert head.values == {"b": 3, "c": [None, "x"]}
    assert head.tensors == [packed.TensorHead("a", "int32", (2, 1), False)]


@pytest.mark.parametrize(
    ("change", "text"),
    [({"dtype": "object"}, "of dtype object; valid: float32, "), ({"shape": (-1, 2)}, r"of shape \[-1, 2\]")],
)
def test_a_tensor_that_cannot_be_is_refused(change: dict[str, Any], text: str) -> None:
    head = msgspec.structs.replace(packed.TensorHead("a", "int32", (2, 1), False), **change)
    with pytest.raises(ProtocolError, match=text):
        packed.packed_bytes([head])


def test_a_dtype_that_is_not_carried_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"tensors\['a'\]: found dtype complex64; valid: float32"):
        packed.describe({"a": torch.zeros(1, dtype=torch.complex64)})
