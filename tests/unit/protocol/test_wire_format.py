"""The bytes on the wire are a promise to peers of other builds: these tests hold it."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drumline.protocol import messages as m
from drumline.protocol.codec import Codec, DecodeError

from .samples import ALL_MESSAGES, ANY_MESSAGE, EARLIER_PATHS, SAMPLES, UNIONS, i32, plain, read_golden

CODEC: Codec[Any] = Codec(ANY_MESSAGE)
BY_NAME = {type(sample).__name__: sample for sample in SAMPLES}
TAG_RANGES = {
    "ToWorker": range(1, 20),
    "FromWorker": range(20, 40),
    "FromClient": range(40, 70),
    "ToClient": range(70, 100),
    "FromSupervisor": range(100, 120),
    "ToSupervisor": range(100, 120),
}


def test_every_message_has_a_sample_and_golden_bytes() -> None:
    names = {cls.__name__ for cls in ALL_MESSAGES}
    assert set(BY_NAME) == names
    assert set(read_golden()) == names


def test_every_message_stands_in_a_union() -> None:
    in_unions = {cls for union in UNIONS.values() for cls in typing.get_args(union)}
    assert in_unions == set(ALL_MESSAGES)


def test_no_tag_is_used_twice() -> None:
    tags = [cls.__struct_config__.tag for cls in ALL_MESSAGES]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("name", TAG_RANGES)
def test_tags_are_in_the_range_of_their_direction(name: str) -> None:
    for cls in typing.get_args(UNIONS[name]):
        assert cls.__struct_config__.tag in TAG_RANGES[name], cls.__name__


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_message_encodes_to_its_golden_bytes(name: str) -> None:
    assert [bytes(frame).hex() for frame in CODEC.encode(BY_NAME[name])] == read_golden()[name]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_golden_bytes_decode_to_the_message(name: str) -> None:
    decoded = CODEC.decode([bytes.fromhex(frame) for frame in read_golden()[name]])
    assert plain(decoded) == plain(BY_NAME[name])


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_samples_set_every_field_apart_from_its_default(name: str) -> None:
    # A sample that leaves a default in place would not notice when two fields change places.
    sample = BY_NAME[name]
    for field in msgspec.structs.fields(type(sample)):
        if name == "CallResult" and field.name == "value":
            continue
        assert plain(getattr(sample, field.name)) != plain(field.default), field.name


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_message_of_an_older_build_lacks_only_fields_with_defaults(name: str) -> None:
    sample = BY_NAME[name]
    head = msgspec.msgpack.decode(bytes.fromhex(read_golden()[name][0]))
    optional = sum(not field.required for field in msgspec.structs.fields(type(sample)))
    frames = [bytes.fromhex(frame) for frame in read_golden()[name]]
    if not optional or len(frames) > 1:
        return
    older = msgspec.msgpack.encode(head[: len(head) - optional])
    decoded = CODEC.decode([older])
    for field in msgspec.structs.fields(type(sample)):
        expected = getattr(sample, field.name) if field.required else field.default
        assert plain(getattr(decoded, field.name)) == plain(expected)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_fields_that_a_newer_build_appended_are_passed_over(name: str) -> None:
    frames = [bytes.fromhex(frame) for frame in read_golden()[name]]
    head = msgspec.msgpack.decode(frames[0])
    newer = msgspec.msgpack.encode([*head, "a field of the future", [1, 2, {"a": None}]])
    assert plain(CODEC.decode([newer, *frames[1:]])) == plain(BY_NAME[name])


@pytest.mark.parametrize("path", EARLIER_PATHS, ids=lambda path: path.stem)
def test_bytes_of_earlier_builds_still_decode(path: Path) -> None:
    for name, frames in json.loads(path.read_text()).items():
        decoded = CODEC.decode([bytes.fromhex(frame) for frame in frames])
        assert type(decoded).__name__ == name
        if path is EARLIER_PATHS[0] and isinstance(decoded, m.Step):
            assert (decoded.lane, decoded.admitted[0].lane) == (0, 0)
        if path is EARLIER_PATHS[0] and isinstance(decoded, m.OpenStore):
            assert decoded.port == 0
        if path is EARLIER_PATHS[-1] and isinstance(decoded, m.StepDone):
            assert (decoded.load.shape, decoded.load_steps) == ((0, 0), 0)
        if path is not EARLIER_PATHS[-1] and isinstance(decoded, m.Configure):
            assert (decoded.parked, len(decoded.slots), decoded.fetches.shape) == ((), 0, (0, 4))


def test_a_message_of_another_direction_is_not_taken() -> None:
    for name, union in UNIONS.items():
        codec: Codec[Any] = Codec(union)
        own = set(typing.get_args(union))
        for sample in SAMPLES:
            if type(sample) in own:
                assert type(codec.decode(codec.encode(sample))) in own
            else:
                with pytest.raises(DecodeError, match="does not decode"):
                    codec.decode(codec.encode(sample))
        assert own, name


def test_the_protocol_version_is_pinned() -> None:
    assert m.PROTOCOL_VERSION == 1


def test_the_documented_table_of_tags_is_the_real_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text()
    documented = dict(re.findall(r"^\| (\d+) \| ([A-Z]\w+) \|", page, re.MULTILINE))
    assert documented == {str(cls.__struct_config__.tag): cls.__name__ for cls in ALL_MESSAGES}


def test_the_documented_example_is_what_is_sent() -> None:
    page = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text()
    block = page.split("```")[1]
    documented = "".join(re.sub(r"\s", "", line[:46]) for line in block.splitlines())
    message = m.StepDone(2, 3, 1, 1000, i32(11, -1, 13), i32())
    assert bytes(CODEC.encode(message)[0]).hex() == documented
