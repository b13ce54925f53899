from __future__ import annotations

import struct
import threading
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from drumline.protocol import messages as m
from drumline.protocol.codec import (
    EXT_F32,
    EXT_FRAME,
    EXT_I32,
    EXT_SHAPED,
    INLINE_BYTES,
    Codec,
    DecodeError,
    config_digest,
)
from drumline.protocol.errors import ProtocolError

from .samples import ALL_MESSAGES, ANY_MESSAGE, CONFIG, LOGPROB, SAMPLES, SAMPLING, i32, plain, read_golden
from .strategies import messages

CODEC: Codec[Any] = Codec(ANY_MESSAGE)
EMPTY = i32()
GOLDEN = [[bytes.fromhex(frame) for frame in frames] for frames in read_golden().values()]


def done(tokens: Any, index: Any = EMPTY) -> m.StepDone:
    return m.StepDone(term=1, epoch=2, rank=0, step=3, tokens=tokens, logprob_index=index)


def wire_done(tokens: object) -> bytes:
    return msgspec.msgpack.encode([23, 1, 2, 0, 3, tokens, Ext(EXT_I32, b"")])


def shaped(code: int, *shape: int, data: bytes = b"") -> bytes:
    return struct.pack(f"<BB{len(shape)}I", code, len(shape), *shape) + data


# ---------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("length", [0, 1, INLINE_BYTES // 4])
def test_small_arrays_travel_in_the_first_frame(length: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    frames = CODEC.encode(done(tokens))
    assert len(frames) == 1
    np.testing.assert_array_equal(CODEC.decode(frames).tokens, tokens)


def test_large_arrays_travel_as_views_of_the_callers_memory() -> None:
    tokens = np.arange(INLINE_BYTES // 4 + 1, dtype=np.int32)
    frames = CODEC.encode(done(tokens))
    assert len(frames) == 2
    assert np.shares_memory(np.frombuffer(frames[1], dtype=np.int32), tokens)
    decoded = CODEC.decode([bytes(f) for f in frames])
    np.testing.assert_array_equal(decoded.tokens, tokens)


@pytest.mark.parametrize("length", [0, 5, 5000])
def test_decoded_arrays_cannot_be_written_to_and_are_aligned(length: int) -> None:
    frames = [bytearray(f) for f in CODEC.encode(done(np.zeros(length, dtype=np.int32)))]
    tokens = CODEC.decode([memoryview(f) for f in frames]).tokens
    assert tokens.flags.aligned
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        tokens[:] = 1


def test_strided_views_are_sent_by_their_content() -> None:
    grid = np.arange(4000, dtype=np.int32).reshape(2000, 2)
    for view in (grid[:3, 1], grid[:, 1], grid[::-1, 0]):
        np.testing.assert_array_equal(CODEC.decode(CODEC.encode(done(view))).tokens, view)
    placement = np.asfortranarray(grid)
    message = m.Configure(1, 1, "serve", (), "127.0.0.1", 1, placement)
    np.testing.assert_array_equal(CODEC.decode(CODEC.encode(message)).placement, placement)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (3, 0), (2, 3), (58, 288)])
def test_a_placement_keeps_its_shape(shape: tuple[int, int]) -> None:
    placement = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    decoded = CODEC.decode(CODEC.encode(m.Configure(1, 1, "serve", (), "127.0.0.1", 1, placement))).placement
    assert decoded.shape == shape
    np.testing.assert_array_equal(decoded, placement)


def test_frames_follow_the_order_of_the_fields() -> None:
    first, second = np.full(600, 1, dtype=np.int32), np.full(700, 2, dtype=np.int32)
    message = done(first, second)
    frames = CODEC.encode(message)
    assert [len(f) for f in frames[1:]] == [2400, 2800]
    assert plain(CODEC.decode(frames)) == plain(message)


def test_more_large_arrays_than_frames_still_arrive() -> None:
    codec: Codec[Any] = Codec(m.ToWorker, max_frames=4)
    admitted = tuple(m.Admit(i, np.full(600, i, dtype=np.int32), 1, 0, EMPTY, SAMPLING) for i in range(10))
    message = m.Step(1, 1, 1, 1, i32(1), EMPTY, admitted, EMPTY, EMPTY, EMPTY, EMPTY)
    frames = codec.encode(message)
    assert len(frames) == 4
    assert plain(codec.decode(frames)) == plain(message)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint32, np.dtype(">i4"), np.bool_, object])
def test_arrays_of_another_dtype_are_not_encoded(dtype: Any) -> None:
    with pytest.raises(TypeError, match="int32 and float32"):
        CODEC.encode(done(np.zeros(3, dtype=dtype)))


@pytest.mark.parametrize("value", [np.int32(3), np.zeros((2, 2, 2), dtype=np.int32), np.array(3, dtype=np.int32), {1j}])
def test_what_a_message_cannot_carry_is_not_encoded(value: Any) -> None:
    with pytest.raises(TypeError):
        CODEC.encode(done(value))


def test_a_failed_encode_leaves_no_frame_behind() -> None:
    with pytest.raises(TypeError):
        CODEC.encode(done(np.arange(1000, dtype=np.int32), np.zeros(2)))
    assert len(CODEC.encode(done(i32(1)))) == 1


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (Ext(EXT_F32, bytes(8)), "extension 2 where 1"),
        (Ext(9, bytes(8)), "extension 9"),
        (Ext(-1, bytes(8)), "does not hold an array"),
        (Ext(EXT_I32, bytes(7)), "buffer size"),
        (bytes(8), "does not hold an array"),
        ([1, 2], "does not hold an array"),
        ("text", "does not hold an array"),
        (None, "does not hold an array"),
        (7, "does not hold an array"),
        (Ext(EXT_SHAPED, b""), "cut short"),
        (Ext(EXT_SHAPED, b"\x01\x01\x01\x00"), "cut short"),
        (Ext(EXT_SHAPED, shaped(EXT_I32, 1, 1, data=bytes(4))), "2 dimensions"),
        (Ext(EXT_SHAPED, shaped(EXT_F32, 2, data=bytes(8))), "code 2"),
        (Ext(EXT_SHAPED, shaped(EXT_I32, 3, data=bytes(8))), "8 bytes for an array of shape"),
        (Ext(EXT_SHAPED, shaped(EXT_I32, 0xFFFFFFFF)), "0 bytes for an array of shape"),
        (Ext(EXT_FRAME, shaped(EXT_I32, 2)), "frame of an array is missing"),
        (Ext(EXT_FRAME, shaped(EXT_I32, 2, data=bytes(8))), "both inline and in a frame"),
    ],
)
def test_an_array_that_is_not_what_its_field_asks_for_is_refused(tokens: object, why: str) -> None:
    with pytest.raises(DecodeError, match=why) as caught:
        CODEC.decode([wire_done(tokens)])
    assert caught.value.reason == "malformed"


def test_a_vector_is_not_taken_for_a_placement() -> None:
    head = msgspec.msgpack.encode([3, 1, 1, "serve", [], "h", 1, Ext(EXT_I32, bytes(8))])
    with pytest.raises(DecodeError, match="extension 1"):
        CODEC.decode([head])


def test_a_shape_whose_product_overflows_is_refused() -> None:
    head = msgspec.msgpack.encode(
        [3, 1, 1, "serve", [], "h", 1, Ext(EXT_SHAPED, shaped(EXT_I32, 1 << 31, 1 << 31, data=bytes(16)))]
    )
    with pytest.raises(DecodeError, match="16 bytes"):
        CODEC.decode([head])


def test_a_frame_of_the_wrong_length_is_refused() -> None:
    frames = CODEC.encode(done(np.arange(600, dtype=np.int32)))
    for wrong in (b"", bytes(2399), bytes(2401), bytes(2396)):
        with pytest.raises(DecodeError, match="bytes for an array"):
            CODEC.decode([frames[0], wrong])


def test_missing_and_surplus_frames_are_refused() -> None:
    frames = CODEC.encode(done(np.arange(600, dtype=np.int32)))
    with pytest.raises(DecodeError, match="missing"):
        CODEC.decode(frames[:1])
    for extra in ([*frames, b""], [*CODEC.encode(done(i32(1))), bytes(4)]):
        with pytest.raises(DecodeError, match="belong to no array") as caught:
            CODEC.decode(extra)
        assert caught.value.reason == "frames"
    assert plain(CODEC.decode(frames).tokens) == plain(np.arange(600, dtype=np.int32))


def test_numbers_of_frames_are_limited_before_anything_is_decoded() -> None:
    for frames in ([], [b"\xc1"] * 65):
        with pytest.raises(DecodeError, match="1 to 64") as caught:
            CODEC.decode(frames)
        assert caught.value.reason == "frames"


def test_frames_over_the_limit_are_refused_on_both_sides() -> None:
    small: Codec[Any] = Codec(m.FromWorker, max_frame_bytes=2400)
    fits, too_long = done(np.zeros(600, dtype=np.int32)), done(np.zeros(601, dtype=np.int32))
    assert len(small.encode(fits)) == 2
    with pytest.raises(ProtocolError, match="StepDone makes a frame of 2404 bytes; the limit is 2400"):
        small.encode(too_long)
    with pytest.raises(DecodeError, match="2404 bytes") as caught:
        small.decode(CODEC.encode(too_long))
    assert caught.value.reason == "oversized"


def test_the_first_frame_that_comes_in_has_a_limit_of_its_own() -> None:
    strict: Codec[Any] = Codec(m.FromWorker, max_head_bytes=100)
    large = done(np.zeros(600, dtype=np.int32))
    assert plain(strict.decode(strict.encode(large))) == plain(large)
    inline = done(np.zeros(50, dtype=np.int32))
    with pytest.raises(DecodeError, match="the limit is 100") as caught:
        strict.decode(strict.encode(inline))
    assert caught.value.reason == "oversized"


@pytest.mark.parametrize("value", [0, -1])
def test_limits_must_be_positive(value: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Codec(m.ToWorker, max_frames=value)
    with pytest.raises(ValueError, match="at least 1"):
        Codec(m.ToWorker, max_frame_bytes=value)
    with pytest.raises(ValueError, match="at least 1"):
        Codec(m.ToWorker, max_head_bytes=value)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\xcc\xc8",
        b"\x93\x02\x01\x02",
        b"\x94\x02\x01\x02\xa1h\x00",
        b"\x94\x02\x01\x02\xa1\xff",
        b"\x94\x02\xa1x\x02\xa1h",
        b"\x94\x02\xc0\x02\xa1h",
        b"\x94\x02\x01\x02",
        b"\x80",
        b"{}",
        b"\x94\xa1\x02\x01\x02\xa1h",
    ],
)
def test_what_is_not_a_message_is_refused(frame: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        CODEC.decode([frame])
    assert caught.value.reason == "malformed"
    assert caught.value.info.kind == "protocol"


HUGE_HEADERS = {
    "array32": b"\xdd\xff\xff\xff\xff",
    "map32": b"\xdf\xff\xff\xff\xff",
    "bin32": b"\xc6\xff\xff\xff\xff",
    "str32": b"\xdb\xff\xff\xff\xff",
    "ext32": b"\xc9\xff\xff\xff\xff\x01",
    "array32 of 2**31": b"\xdd\x80\x00\x00\x00",
    "nested array16": b"\xdc\xff\xff" * 400,
    "nested array32": b"\xdd\xff\xff\xff\xff" * 400,
    "deeper than any stack": b"\x91" * 1_000_000,
}


@pytest.mark.parametrize("name", HUGE_HEADERS)
def test_a_header_that_claims_what_is_not_there_allocates_nothing(name: str) -> None:
    huge = HUGE_HEADERS[name]
    places = [huge, b"\x94\x02" + huge, b"\x94\x02\x01\x02" + huge, b"\x97\x17\x01\x02\x00\x03" + huge]
    # Finished holds a tuple of structs, Resume one of ints, Submit a struct with a tuple inside.
    places += [b"\x93\x4a\x01" + huge, b"\x94\x2d\x01\xa1r" + huge, b"\x9a\x29\x01\xa1r" + huge]
    tracemalloc.start()
    try:
        for frame in places:
            with pytest.raises(DecodeError):
                CODEC.decode([frame])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


# -------------------------------------------------------------------------------------------------------- at random


@settings(max_examples=300, deadline=None)
@given(messages(*ALL_MESSAGES))
def test_any_message_survives_the_round_trip(message: m.Message) -> None:
    frames = CODEC.encode(message)
    assert plain(CODEC.decode([bytes(f) for f in frames])) == plain(message)


def refuse_or_take(frames: list[bytes]) -> None:
    """Decoding may refuse with DecodeError or give a message that encodes again; nothing else may happen."""
    try:
        message = CODEC.decode(frames)
    except DecodeError:
        return
    CODEC.encode(message)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    refuse_or_take(frames)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(GOLDEN), st.data())
def test_mutated_frames_are_refused_or_taken(frames: list[bytes], data: st.DataObject) -> None:
    mutated = [bytearray(f) for f in frames]
    for _ in range(data.draw(st.integers(1, 5))):
        frame = data.draw(st.sampled_from(mutated))
        if frame:
            frame[data.draw(st.integers(0, min(len(frame), 200) - 1))] = data.draw(st.integers(0, 255))
    refuse_or_take([bytes(f) for f in mutated])


def test_every_truncation_of_every_message_is_refused() -> None:
    for frames in GOLDEN:
        for length in range(len(frames[0])):
            with pytest.raises(DecodeError):
                CODEC.decode([frames[0][:length], *frames[1:]])


def test_thousands_of_mutations_of_every_message_are_refused_or_taken() -> None:
    rng = np.random.default_rng(20240)
    for frames in GOLDEN:
        for _ in range(400):
            head = bytearray(frames[0])
            for place in rng.integers(0, len(head), size=rng.integers(1, 6)).tolist():
                head[place] = int(rng.integers(0, 256))
            cut = int(rng.integers(0, len(head) + 1)) if rng.random() < 0.3 else len(head)
            refuse_or_take([bytes(head[:cut]), *frames[1:]])


# ------------------------------------------------------------------------------------------------- threads, digest


def test_threads_do_not_see_each_others_frames() -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(value: int) -> None:
        try:
            start.wait(10)
            for length in range(600, 900):
                tokens = np.full(length, value, dtype=np.int32)
                decoded = CODEC.decode(CODEC.encode(done(tokens, tokens[:550])))
                np.testing.assert_array_equal(decoded.tokens, tokens)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []


def test_the_digest_of_a_configuration_is_pinned_and_sees_every_field() -> None:
    digest = config_digest(CONFIG)
    assert digest == "02cefc72728fbaf0"
    assert config_digest(msgspec.structs.replace(CONFIG)) == digest
    changed = {
        field.name: config_digest(msgspec.structs.replace(CONFIG, **{field.name: value}))
        for field in msgspec.structs.fields(m.WorkerConfig)
        for value in [not getattr(CONFIG, field.name) if field.type is bool else different(getattr(CONFIG, field.name))]
    }
    assert digest not in changed.values()
    assert len(set(changed.values())) == len(changed)


def different(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value, 1)
    return value + "x" if isinstance(value, str) else value + 1


def test_the_digest_sees_the_names_of_fields() -> None:
    one = msgspec.defstruct("Config", [("a", int)], array_like=True)
    other = msgspec.defstruct("Config", [("b", int)], array_like=True)
    assert config_digest(one(1)) != config_digest(other(1))


def test_samples_hold_logprobs() -> None:
    decoded = CODEC.decode(CODEC.encode(next(s for s in SAMPLES if isinstance(s, m.StepDone))))
    assert plain(decoded.logprobs) == plain((LOGPROB,))
    assert decoded.logprobs[0].top_logprobs.dtype == np.float32
