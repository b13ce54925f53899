"""Random days with takeovers, quarantines and lost connections: no request is lost, no token repeated or other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from drumline.engine.core.confinement import Confinement
from drumline.engine.core.dispatch import Dispatch
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.request import Request, Sequence
from drumline.engine.core.takeover import TakeOver
from tests.simulation.harsh import run_harsh_scenario
from tests.simulation.scenario import make_scenario
from tests.simulation.test_simulation import assert_met
from tests.simulation.worker import RuleBrokenError


@pytest.mark.parametrize("forgetful", [0.0, 0.5])
def test_harsh_days_end_with_every_request_ended(forgetful: float) -> None:
    seen: Counter[str] = Counter()
    for seed in range(250):
        seen.update(run_harsh_scenario(make_scenario(seed), forgetful))
    assert_met(
        seen,
        ["takeover", "confined", "drop", "came_back", "accepted_again", "cancel", "stop_string"],
        ["lost", "kept", "join", "end_stop", "end_length", "end_abort"],
        ["forgotten_by_journal", "tokens_forgotten"] if forgetful else [],
    )


def _count_what_is_in_flight_for_changed_tokens(patch: pytest.MonkeyPatch) -> None:
    def put_back(group: LockstepGroup, sequence: Sequence) -> None:
        group.take_out([sequence])

    patch.setattr(LockstepGroup, "put_back", put_back)


def _let_everybody_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Confinement, "must_leave", lambda one, request_id, replica, fits: False)


def _forget_who_was_held(patch: pytest.MonkeyPatch) -> None:
    def hold(dispatch: Dispatch, request: Request) -> None:
        dispatch._groups[request.group].take_out(request.live)

    patch.setattr(Dispatch, "_hold", hold)


def _tell_a_journal_nothing_of_adopted_tokens(patch: pytest.MonkeyPatch) -> None:
    take = TakeOver._take

    def silent(takeover: TakeOver, sequence: Sequence, tokens: object, known: int) -> None:
        before = list(takeover._book.outbox._emissions)
        take(takeover, sequence, tokens, known)  # type: ignore[arg-type]
        takeover._book.outbox._emissions = before

    patch.setattr(TakeOver, "_take", silent)


@pytest.mark.parametrize(
    "break_core",
    [
        _count_what_is_in_flight_for_changed_tokens,
        _let_everybody_stay,
        _forget_who_was_held,
        _tell_a_journal_nothing_of_adopted_tokens,
    ],
)
def test_a_broken_core_is_caught(
    break_core: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_core(monkeypatch)
    with pytest.raises(RuleBrokenError, match=r"harsh seed \d+"):
        _run_seeds(600)


def _run_seeds(count: int) -> None:
    for seed in range(count):
        run_harsh_scenario(make_scenario(seed), 0.5)
