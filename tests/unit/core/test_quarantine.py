"""Suspects of deaths from inside are halved until one is left, and only that one is found to kill."""

from __future__ import annotations

import pytest

from drumline.engine.core.quarantine import PASSED_TOKENS, Quarantine


def find(requests: list[str], poisoned: str | None) -> tuple[str | None, int]:
    """Run the deaths that ``poisoned`` causes, as often as it takes. Returns what was found and how many deaths."""
    quarantine = Quarantine()
    tokens = dict.fromkeys(requests, 0)
    deaths = 0
    for _ in range(200):
        running = list(quarantine.confinement.active) or requests
        if poisoned in running:
            deaths += 1
            found = quarantine.died(running, tokens)
            if found is not None:
                return found, deaths
            continue
        tokens = {one: told + (PASSED_TOKENS if one in running else 0) for one, told in tokens.items()}
        if not quarantine.progressed(tokens) or not quarantine:
            break
    return None, deaths


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 32])
def test_the_one_that_kills_is_found_wherever_it_stands(count: int) -> None:
    requests = [f"r{i}" for i in range(count)]
    for poisoned in requests:
        found, deaths = find(requests, poisoned)
        assert found == poisoned
        assert deaths <= 3 + count.bit_length()


def test_nobody_is_confined_after_one_death() -> None:
    quarantine = Quarantine()
    assert quarantine.died(["a", "b"], {"a": 3, "b": 0}) is None
    assert not quarantine


def test_only_those_that_were_suspected_twice_are_confined() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("abcd", 0)
    quarantine.died(["a", "b"], tokens)
    quarantine.died(["b", "c", "d"], tokens)
    assert quarantine.confinement.active == ("b",)
    assert quarantine.confinement.held == ()


def test_halves_that_come_past_the_place_are_released_one_after_the_other() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("abcd", 5)
    quarantine.died("abcd", tokens)
    quarantine.died("abcd", tokens)
    assert quarantine.confinement.active == ("a", "b")
    assert quarantine.confinement.held == ("c", "d")
    assert not quarantine.progressed(tokens | {"a": 5 + PASSED_TOKENS})
    assert quarantine.progressed({"a": 5 + PASSED_TOKENS, "c": 5, "d": 5})  # b has ended
    assert quarantine.confinement.active == ("c", "d")
    assert quarantine.progressed({"c": 90, "d": 90})
    assert not quarantine


def test_what_was_acquitted_starts_anew() -> None:
    quarantine = Quarantine()
    tokens = {"a": 0}
    quarantine.died(["a"], tokens)
    quarantine.died(["a"], tokens)
    assert quarantine.progressed({"a": PASSED_TOKENS})
    assert quarantine.died(["a"], {"a": PASSED_TOKENS}) is None
    assert not quarantine


def test_a_death_of_others_does_not_end_a_confinement() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("abx", 0)
    quarantine.died("ab", tokens)
    quarantine.died("ab", tokens)
    assert quarantine.died("x", tokens) is None
    assert quarantine.confinement.active == ("a",)


def test_the_others_are_released_once_the_one_is_found() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("abcd", 0)
    for _ in range(2):
        quarantine.died("abcd", tokens)
    quarantine.died("ab", tokens)
    assert quarantine.died("a", tokens) == "a"
    assert not quarantine
    assert quarantine.confinement.held == ()
    assert quarantine.poisoned == 1


def test_a_death_elsewhere_is_not_laid_at_those_that_run_apart() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("abc", 0)
    quarantine.died(["a", "b"], tokens)
    quarantine.died(["a", "c"], tokens)
    assert quarantine.confinement.active == ("a",)
    assert quarantine.died(["a", "b"], tokens, apart=False) is None
    assert quarantine.confinement.active == ("a",)
    assert quarantine.confinement.held == ("b",), "its turn comes when a has gone on without killing"
    assert quarantine.progressed(tokens | {"a": PASSED_TOKENS})
    assert quarantine.confinement.active == ("b",)
    assert quarantine.died(["b"], tokens) == "b"


def test_who_is_alone_in_the_steps_is_guilty_wherever_a_rank_dies() -> None:
    quarantine = Quarantine()
    tokens = dict.fromkeys("ab", 0)
    quarantine.died(["a", "b"], tokens)
    quarantine.died(["a"], tokens)
    assert quarantine.died(["a"], tokens, apart=False) == "a"
