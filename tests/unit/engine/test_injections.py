"""Faults that are ordered: kept until they have happened, and checked before anything is done."""

from __future__ import annotations

import random

import pytest

from drumline.engine.injections import Injections
from drumline.engine.message_faults import FaultRules
from drumline.protocol.messages import Injected, Injection, MessageFault, Shutdown, WelcomeWorker
from tests.unit.protocol.samples import CONFIG


def test_a_new_process_is_welcomed_with_what_it_is_to_do() -> None:
    injections = Injections()
    injections.add((Injection(1, 0, "kill", "loading"), Injection(2, 1, "kill", "joining")))
    welcome = WelcomeWorker(1, 1, "", CONFIG)
    told = injections.into(1, welcome)
    assert isinstance(told, WelcomeWorker)
    assert [one.number for one in told.injections] == [2]
    assert injections.into(3, welcome) is welcome
    goodbye = Shutdown(1)
    assert injections.into(1, goodbye) is goodbye


def test_what_has_happened_is_not_ordered_again() -> None:
    injections = Injections()
    injections.add((Injection(1, 0, "kill"), Injection(2, 0, "slow")))
    injections.seen(Injected(1, 0, "i", 1))
    assert [one.number for one in injections.of(0)] == [2]
    assert injections.order(0, 5).injections == injections.of(0)
    injections.clear()
    assert len(injections) == 0


@pytest.mark.parametrize(
    ("fault", "direction", "name", "rank", "met"),
    [
        (MessageFault("drop"), "to_worker", "Step", 0, True),
        (MessageFault("drop", direction="from_worker"), "to_worker", "Step", 0, False),
        (MessageFault("drop", messages=("Step",)), "to_worker", "Call", 0, False),
        (MessageFault("drop", messages=("Step", "Call")), "to_worker", "Call", 0, True),
        (MessageFault("drop", ranks=(1, 2)), "from_worker", "StepDone", 2, True),
        (MessageFault("drop", ranks=(1, 2)), "from_worker", "StepDone", 0, False),
        (MessageFault("drop", probability=0.0), "from_worker", "StepDone", 0, False),
        (MessageFault("drop", lasting_s=2.0), "from_worker", "StepDone", 0, False),
    ],
)
def test_a_rule_meets_what_it_is_about(fault: MessageFault, direction: str, name: str, rank: int, met: bool) -> None:
    rules = FaultRules()
    rules.add((fault,), 10.0)
    assert (rules.decide(direction, name, rank, 12.5) is not None) == met
    assert rules.counts["drop"] == int(met)


def test_a_rule_is_spent_after_so_many_messages() -> None:
    rules = FaultRules()
    rules.add((MessageFault("duplicate", times=2),), 0.0)
    met = [rules.decide("to_worker", "Step", 0, 1.0) for _ in range(5)]
    assert [one is not None for one in met] == [True, True, False, False, False]


def test_the_same_seed_meets_the_same_messages() -> None:
    fault = MessageFault("drop", probability=0.3, seed=7)
    runs: list[list[bool]] = []
    for _ in range(2):
        rules = FaultRules()
        rules.add((fault,), 0.0)
        runs.append([rules.decide("to_worker", "Step", 0, 1.0) is not None for _ in range(200)])
    dice = random.Random(7)
    assert runs[0] == runs[1] == [dice.random() < 0.3 for _ in range(200)]


def test_a_fault_that_is_taken_back_does_not_come() -> None:
    injections = Injections()
    injections.add((Injection(1, 0, "kill", "decode"), Injection(2, 0, "hang", "step")))
    injections.add((Injection(1, 0, "none"), Injection(7, 0, "none")))
    assert [one.number for one in injections.of(0)] == [2]
