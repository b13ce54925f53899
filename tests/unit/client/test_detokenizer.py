import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.engine.detokenizer import Detokenizer, IncrementalText, StopStrings
from tests.unit.client.tokenizers_for_tests import byte_tokenizer, demo_tokenizer

BYTES = byte_tokenizer()
DEMO = demo_tokenizer()


def texts_by_token(ids: list[int], prompt: list[int] | None = None) -> list[str]:
    source = IncrementalText(BYTES, prompt or [])
    return [source.push(token) for token in ids]


def detokenizer(stop: tuple[str, ...] = (), **options: object) -> Detokenizer:
    return Detokenizer(IncrementalText(BYTES, []), stop=stop, **options)  # type: ignore[arg-type]


def push_text(target: Detokenizer, text: str) -> str | None:
    matched = None
    for byte in text.encode():
        matched = target.push(byte) or matched
    return matched


def test_a_character_is_given_out_once_its_last_byte_is_there() -> None:
    assert texts_by_token(list("aé中🎉b".encode())) == ["a", "", "é", "", "", "中", "", "", "", "🎉", "b"]


def test_bytes_that_make_no_character_are_shown_when_it_is_certain() -> None:
    pieces = texts_by_token([ord("a"), 0xFF, ord("b"), 0xE4, ord("c")])
    assert "".join(pieces) == "a�b�c"
    assert pieces[1] == ""
    assert pieces[3] == ""


def test_a_long_run_of_broken_bytes_neither_stalls_nor_grows_the_window() -> None:
    source = IncrementalText(BYTES, [])
    given_out = "".join(source.push(0xFF) for _ in range(500))
    assert len(given_out) >= 490
    assert set(given_out) == {"�"}
    assert "".join(source.push(byte) for byte in "中x".encode()).endswith("中x")


def test_a_special_token_has_no_text_unless_it_is_asked_for() -> None:
    shown = IncrementalText(BYTES, [], skip_special_tokens=False)
    assert [shown.push(token) for token in (ord("a"), 256)] == ["a", "<end>"]
    assert texts_by_token([ord("a"), 256, ord("b")]) == ["a", "", "b"]


@given(st.text(max_size=60), st.integers(0, 2**32))
def test_the_pieces_of_any_text_join_to_the_text(text: str, seed: int) -> None:
    prompt = list(random.Random(seed).randbytes(4))
    pieces = texts_by_token(list(text.encode()), prompt)
    tail = "".join(pieces)
    assert tail.endswith(text.rstrip("�")) or (not prompt and tail == text)


@given(st.lists(st.integers(0, 2047), max_size=60), st.lists(st.integers(0, 2047), max_size=8))
def test_text_of_the_demo_tokenizer_agrees_with_decoding_everything_at_once(ids: list[int], prompt: list[int]) -> None:
    source = IncrementalText(DEMO, prompt)
    prefixes = []
    text = ""
    for token in ids:
        text += source.push(token)
        prefixes.append(text)
    whole = DEMO.decode(ids)
    if "�" not in whole and "�" not in DEMO.decode(prompt):
        assert text == whole
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(prefixes))


def test_a_stop_string_is_found_across_tokens_and_cut_off() -> None:
    target = detokenizer(("STOP",))
    assert push_text(target, "one STOP") == "STOP"
    assert target.text == "one "
    assert target.settled == 4


def test_what_could_be_the_start_of_a_stop_string_is_held_back_and_then_let_go() -> None:
    target = detokenizer(("STOP",))
    push_text(target, "a ST")
    assert target.text[: target.settled] == "a "
    push_text(target, "x")
    assert target.text[: target.settled] == "a STx"
    push_text(target, "STO")
    assert target.text[: target.settled] == "a STx"
    target.finish()
    assert target.text[: target.settled] == "a STxSTO"


def test_a_stop_string_stays_in_the_text_when_asked_and_nothing_is_held_back() -> None:
    target = detokenizer(("STOP",), include_stop=True)
    push_text(target, "a ST")
    assert target.text[: target.settled] == "a ST"
    assert push_text(target, "OP") == "STOP"
    assert target.text == "a STOP"


def test_nothing_is_taken_after_a_match() -> None:
    target = detokenizer(("b",))
    push_text(target, "ab")
    push_text(target, "cde")
    assert target.text == "a"


def test_a_stop_string_that_is_complete_before_min_tokens_is_passed_over() -> None:
    target = detokenizer(("ab",), min_tokens=2)
    assert push_text(target, "ab") is None
    assert push_text(target, "ab") == "ab"
    assert target.text == "ab"


def test_a_stop_string_that_ends_after_min_tokens_counts_from_its_start() -> None:
    target = detokenizer(("ab",), min_tokens=1)
    assert push_text(target, "ab") == "ab"
    assert target.text == ""


def test_the_token_that_ends_a_sequence_has_no_text() -> None:
    target = detokenizer(hidden_ids=frozenset({ord("!")}))
    push_text(target, "a!")
    assert target.text == "a"
    shown = detokenizer(hidden_ids=frozenset({ord("!")}), include_stop=True)
    push_text(shown, "a!")
    assert shown.text == "a!"


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (("bc", "abcd"), "abcd", ("bc", 3)),
        (("cd", "abcd"), "abcd", ("abcd", 4)),
        (("aab",), "aaab", ("aab", 4)),
        (("abab", "x"), "abaabab", ("abab", 7)),
        (("x",), "abc", None),
    ],
)
def test_the_match_that_ends_first_wins_then_the_longest(
    stops: tuple[str, ...], text: str, found: tuple[str, int] | None
) -> None:
    assert StopStrings(stops).feed(text) == found


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.text("abc", max_size=40),
    st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_matching_does_not_depend_on_how_the_text_was_cut(stops: list[str], text: str, cuts: list[int]) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = min(ends, default=None)
    matcher = StopStrings(stops)
    start, found = 0, None
    for size in [*cuts, len(text) + 1]:
        piece = text[start : start + size]
        match = matcher.feed(piece)
        if match is not None:
            found = start + match[1]
            break
        start += len(piece)
    assert found == expected
