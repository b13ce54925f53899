from __future__ import annotations

import msgspec
import pytest

from drumline.protocol import errors
from drumline.protocol.errors import DrumlineError, ErrorInfo, InvalidConfig, InvalidRequest, RequestFailed, from_info

PLAIN = [
    errors.DuplicateRequest,
    errors.QueueFull,
    errors.Draining,
    errors.StartFailed,
    errors.RequestFailed,
    errors.EngineClosed,
    errors.ProtocolError,
]


def over_the_wire(info: ErrorInfo) -> ErrorInfo:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=ErrorInfo)


@pytest.mark.parametrize("cls", PLAIN)
def test_an_error_is_raised_again_as_what_it_was(cls: type[DrumlineError]) -> None:
    info = ErrorInfo(cls.kind, "text", cls.retryable, 1, "inc", 2, 3, "trace")
    error = from_info(over_the_wire(info))
    assert type(error) is cls
    assert error.info == info
    assert (error.text, error.rank, error.incarnation, error.epoch, error.step) == ("text", 1, "inc", 2, 3)
    assert error.traceback == "trace"
    assert str(error) == "text"


@pytest.mark.parametrize("cls", [InvalidConfig, InvalidRequest])
def test_an_invalid_field_keeps_field_found_and_valid(cls: type[errors.InvalidField]) -> None:
    error = cls("top_p", 1.5, "0 to 1")
    again = from_info(over_the_wire(error.info))
    assert type(again) is cls
    assert isinstance(again, ValueError)
    assert str(again) == "top_p: found 1.5; valid: 0 to 1"
    assert (again.info.field, again.info.found, again.info.valid) == ("top_p", "1.5", "0 to 1")


def test_an_error_of_an_unknown_kind_keeps_its_information() -> None:
    info = ErrorInfo("of the future", "text", rank=3)
    error = from_info(info)
    assert type(error) is RequestFailed
    assert error.info == info
