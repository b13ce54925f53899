"""What may be called on a rank, how arguments are read, and what goes back."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch

from drumline.engine.control_calls import pack_arguments
from drumline.protocol.errors import InvalidConfig, InvalidRequest, QueueFull
from drumline.workers import Worker, remote
from drumline.workers.remote_methods import MAX_RESULT_BYTES, RemoteMethods, callable_names, failure
from drumline.workers.worker_class import worker_class


class Base:
    """Stands for the worker."""

    def __init__(self) -> None:
        self._runner = 7
        self.remote = RemoteMethods(self, Base)

    def run(self) -> int:
        return 0

    @property
    def rank(self) -> int:
        return 3

    @remote
    def load(self) -> list[int]:
        return [1, 2]


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Mine(Base):
    """What a user may write."""

    limit = 5

    def run(self) -> int:  # no more callable for having been overridden
        return 1

    def load(self) -> list[int]:
        return [9]

    def scale(self, values: list[float], by: float = 2.0, *, sign: Literal["+", "-"] = "+") -> list[float]:
        return [value * by * (1 if sign == "+" else -1) for value in values]

    def shift(self, point: Point, by: Point | None = None) -> Point:
        return Point(point.x + (by.x if by else 1))

    def untyped(self, one, *others, **named):  # type: ignore[no-untyped-def]  # noqa: ANN
        return [one, others, named]

    def typed_rest(self, *counts: int, **names: str) -> int:
        return sum(counts) + len(names)

    def only_by_position(self, one: int, /) -> int:
        return one

    def takes_tensor(self, weights: torch.Tensor) -> None:
        raise AssertionError("never reached")

    def takes_list_of_arrays(self, arrays: list[np.ndarray[Any, Any]] | None = None) -> str:
        return "called"

    def takes_what_is_unknown(self, one: NoSuchType) -> None:  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("never reached")

    def give(self, what: str) -> object:
        made: dict[str, object] = {
            "tensor": torch.ones(2),
            "array": np.ones(2),
            "inside": {"weights": [torch.ones(1)]},
            "large": b"x" * (MAX_RESULT_BYTES - 5),
            "too large": b"x" * MAX_RESULT_BYTES,
            "whole": 1 << 64,
            "surrogate": "\ud800",
            "none": None,
        }
        return made[what]

    def fail(self, text: str) -> None:
        raise LookupError(text)

    @staticmethod
    def plain(one: int) -> int:
        return one

    async def later(self) -> None: ...

    def _private(self) -> None: ...


def called(method: str, *args: Any, **kwargs: Any) -> Any:
    return msgspec.msgpack.decode(Mine().remote.call(method, pack_arguments(args, kwargs)))


def refused(method: str, *args: Any, **kwargs: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        called(method, *args, **kwargs)
    return caught.value


def test_arguments_arrive_as_their_annotations_ask() -> None:
    assert called("scale", [1, 2.5]) == [2.0, 5.0]
    assert called("scale", [1.0], by=3, sign="-") == [-3.0]
    assert called("shift", {"x": 4}) == {"x": 5, "y": 0.5}
    assert called("shift", Point(4), by=Point(10)) == {"x": 14, "y": 0.5}
    assert called("untyped", {"a": [1]}, 2, b"3", four=None) == [{"a": [1]}, [2, b"3"], {"four": None}]
    assert called("typed_rest", 1, 2, a="x") == 4
    assert called("only_by_position", 6) == 6
    assert called("plain", 8) == 8
    assert called("load") == [9]


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "field", "said"),
    [
        ("scale", ["x"], {}, "values", "Expected `array`, got `str`"),
        ("scale", [["1"]], {}, "values", "Expected `float`, got `str` - at `$[0]`"),
        ("scale", [[1.0], "2"], {}, "by", "valid: by: float = 2.0"),
        ("scale", [[1.0]], {"sign": "x"}, "sign", "'x'"),
        ("scale", [], {}, "values", "missing a required argument"),
        ("scale", [[1.0], 1.0, "+"], {}, "args", "too many positional arguments"),
        ("scale", [[1.0]], {"values": [2.0]}, "values", "multiple values"),
        ("scale", [[1.0]], {"scale": 1}, "scale", "unexpected keyword argument"),
        ("shift", [{"x": "1"}], {}, "point", "`$.x`"),
        ("shift", [{"x": True}], {}, "point", "Expected `int`, got `bool`"),
        ("plain", [1.5], {}, "one", "Expected `int`, got `float`"),
        ("typed_rest", [1, "2"], {}, "counts", "Expected `int`"),
        ("typed_rest", [1], {"a": 2}, "names", "Expected `str`"),
        ("only_by_position", [], {"one": 1}, "one", "one"),
        ("takes_tensor", [[1.0]], {}, "weights", "torch.Tensor"),
        ("takes_list_of_arrays", [[[1.0]]], {}, "arrays", "ndarray"),
        ("takes_what_is_unknown", [1], {}, "one", "NoSuchType"),
        ("later", [], {}, "method", "a coroutine function"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    method: str, args: list[Any], kwargs: dict[str, Any], field: str, said: str
) -> None:
    error = refused(method, *args, **kwargs)
    assert error.info.field == field
    assert said in error.text
    assert error.info.found
    assert error.info.valid


def test_a_parameter_that_nothing_can_be_passed_for_may_be_left_out() -> None:
    assert called("takes_list_of_arrays") == "called"
    assert called("takes_list_of_arrays", None) == "called"


def test_arguments_that_are_no_msgpack_are_refused() -> None:
    for packed in (b"\xc1", b"\x90", b"\x92\x90\x90", b"\x92\x90\x81\x01\x02"):
        with pytest.raises(InvalidRequest) as caught:
            Mine().remote.call("load", packed)
        assert caught.value.info.field == "args"


@pytest.mark.parametrize(
    "name",
    ["run", "rank", "limit", "remote", "_private", "_runner", "__init__", "__class__", "", "load.x", "nope", "ping"],
)
def test_nothing_else_can_be_called(name: str) -> None:
    error = refused(name)
    assert error.info.field == "method"
    assert "ping, stats, fail, give, later, load, only_by_position, plain" in error.info.valid


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tensor", "torch.Tensor; valid: what msgpack carries"),
        ("array", "numpy.ndarray"),
        ("inside", ".tolist()"),
        ("too large", "8388613 bytes of msgpack; valid: at most 8388608 bytes"),
        ("whole", "ints"),
        ("surrogate", "surrogates"),
    ],
)
def test_a_result_that_cannot_travel_is_refused_with_its_type(what: str, said: str) -> None:
    error = refused("give", what)
    assert error.info.field == "the result of give"
    assert said in error.text


def test_a_result_at_the_limit_travels() -> None:
    assert len(called("give", "large")) == MAX_RESULT_BYTES - 5
    assert called("give", "none") is None


def test_what_a_method_raises_comes_out() -> None:
    with pytest.raises(LookupError, match="words"):
        called("fail", "words")


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_any_exception_becomes_what_a_message_can_carry() -> None:
    def info_of(error: Exception) -> Any:
        try:
            raise error
        except Exception as caught:
            info = failure(caught)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=type(info))

    plain = info_of(LookupError("words"))
    assert (plain.kind, plain.text) == ("remote_error", "LookupError: words")
    assert "info_of" in plain.traceback
    assert info_of(LookupError("\ud800")).text == "LookupError: \\ud800"
    assert "BadText" in info_of(BadText()).text
    assert len(info_of(LookupError("x" * 1_000_000)).text) <= 8_000
    ours = info_of(InvalidRequest("count", 7, "less"))
    assert (ours.kind, ours.field, ours.found, ours.valid) == ("invalid_request", "count", "7", "less")
    assert info_of(QueueFull("full")).retryable


def test_a_rank_offers_its_own_methods_that_are_marked() -> None:
    assert callable_names(Worker, Worker) == ("expert_load", "expert_state")


class Common:
    def shared(self) -> int:
        return 1

    @remote
    def marked(self) -> int:
        return 2


class Extension(Common):
    def probe(self) -> int:
        return self.rank  # type: ignore[attr-defined, no-any-return]


class Further(Mine):
    def more(self) -> int:
        return 1


def test_an_extension_offers_what_it_defines_and_what_is_marked() -> None:
    cls = worker_class(Further, "auto", f"{__name__}:Extension")
    names = callable_names(cls, Base)
    assert {"probe", "marked", "scale", "more", "load"} <= set(names)
    assert not {"shared", "run", "rank"} & set(names)
    assert msgspec.msgpack.decode(cls().remote.call("probe", b"")) == 3


class Hiding:
    def _runner(self) -> None: ...


def test_a_name_under_which_the_worker_keeps_something_is_refused() -> None:
    cls = worker_class(Base, "auto", f"{__name__}.Hiding")
    with pytest.raises(InvalidConfig) as caught:
        cls()
    assert (caught.value.info.field, "Hiding, which defines _runner" in caught.value.text) == (
        "worker_extension_cls",
        True,
    )


def test_the_package_offers_both_names_and_no_others() -> None:
    package = sys.modules["drumline.workers"]
    assert package.Worker is Worker
    assert package.remote is remote
    with pytest.raises(AttributeError, match="helper"):
        _ = package.helper
