"""The objects that groups exchange, as bytes."""

from __future__ import annotations

import pytest

from drumline.protocol.errors import ProtocolError
from drumline.protocol.objects import MAX_OBJECT_BYTES, decode_object, encode_object


def test_objects_that_do_not_travel_are_refused() -> None:
    with pytest.raises(ProtocolError, match="8388614 bytes"):
        encode_object(bytes(MAX_OBJECT_BYTES + 1))
    with pytest.raises(ProtocolError, match="does not carry"):
        encode_object(1 << 100)
    with pytest.raises(ProtocolError, match="does not decode: Expected `int`, got `str`"):
        decode_object(encode_object("a"), int)
