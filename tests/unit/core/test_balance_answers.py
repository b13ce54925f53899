"""What the planner answers is looked at before ranks are told anything."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.protocol.messages import NO_FETCHES, I32Matrix

from .balance_fixtures import MOVES, OTHER, START, Driven, answer

FEWER = START.copy()
FEWER[0, 3] = 2
"""Expert 3 of layer 0 is nowhere."""


def changed(at: tuple[int, int], value: int) -> I32Matrix:
    moves = MOVES.copy()
    moves[at] = value
    return moves


def wrong_answers(request: PlanRequest) -> dict[str, PlacementPlan]:
    beyond, nothing = OTHER.copy(), OTHER.copy()
    beyond[0, 4], nothing[0, 4] = 4, -1
    return {
        "valid: (2, 6)": answer(request, OTHER[:, :5]),
        "experts 0 to 4": answer(request, beyond),
        "experts -1 to 3": answer(request, nothing),
        "no slot for expert 3 of MoE layer 0": answer(request, FEWER, np.array([[0, 3, 0, 2]], np.int32)),
        "valid: (n, 4)": answer(request, OTHER, MOVES[:, :3]),
        "out of range": answer(request, OTHER, changed((0, 0), 2)),
        "out of range; ": answer(request, OTHER, changed((0, 2), -1)),
        "out of range; valid": answer(request, OTHER, changed((1, 3), 6)),
        "its source does not have": answer(request, OTHER, changed((0, 2), 1)),
        "another expert": answer(request, OTHER, changed((0, 3), 1)),
        "do not lead": answer(request, OTHER, MOVES[:1]),
        "do not lead to": answer(request, OTHER, MOVES[[0, 0, 1]]),
        "do not lead to its": answer(request, OTHER, NO_FETCHES),
        "no number": msgspec.structs.replace(answer(request), balancedness=float("nan")),
    }


@pytest.mark.parametrize("why", wrong_answers(Driven().asked()))
def test_an_answer_that_is_no_plan_moves_nothing_and_who_asked_is_told_why(why: str) -> None:
    driven = Driven()
    driven.planned(wrong_answers(driven.asked())[why])
    ((callers, report),) = driven.answers
    assert (callers, report.outcome) == ((9,), "failed")
    assert why in report.reason
    assert (driven.sent, driven.plan_step()) == ([], None)
    assert (driven.balancer.placement == START).all()


def test_after_an_answer_that_is_no_plan_the_next_one_is_carried_out() -> None:
    driven = Driven()
    driven.planned(answer(driven.asked(), FEWER))
    driven.planned(answer(driven.asked()))
    assert [one.rank for one in driven.sent] == [0, 1]
