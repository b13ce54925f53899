from __future__ import annotations

import numpy as np
import pytest

from drumline.protocol.messages import Injection, Step
from drumline.workers.injection import FaultInjector, InjectedError, Injections, points_of

NONE = np.zeros(0, dtype=np.int32)


def step_of(*prefill_counts: int) -> Step:
    counts = np.array(prefill_counts, dtype=np.int32)
    return Step(1, 1, 0, 0, NONE, NONE, (), NONE, NONE, np.arange(len(counts), dtype=np.int32), counts)


@pytest.mark.parametrize(
    ("step", "computes", "points"),
    [
        (step_of(5, 1), True, ("step", "prefill")),
        (step_of(), True, ("step", "decode")),
        (step_of(1), True, ("step",)),  # a row restated after a fault, or the end of a prompt
        (step_of(), False, ("step",)),
    ],
)
def test_the_points_that_a_step_is(step: Step, computes: bool, points: tuple[str, ...]) -> None:
    assert points_of(step, computes) == points


def test_each_comes_once_in_the_order_of_the_list_and_only_to_its_rank() -> None:
    waiting = Injections(2)
    assert not waiting.armed
    waiting.replace([Injection(1, 2, "kill", "step"), Injection(2, 1, "kill", "step"), Injection(3, 2, "stop", "step")])
    assert waiting.awaits("step")
    assert [one.number for _ in range(2) if (one := waiting.take(("step",), 0)) is not None] == [1, 3]
    assert waiting.take(("step",), 0) is None
    assert not waiting.armed
    waiting.replace([Injection(1, 2, "kill", "step")])
    assert not waiting.armed


def test_a_list_takes_the_place_of_the_one_before() -> None:
    waiting = Injections(0)
    waiting.replace([Injection(1, 0, "kill", "step")])
    waiting.replace([Injection(2, 0, "kill", "idle")])
    assert not waiting.awaits("step")
    assert waiting.awaits("idle")
    waiting.replace([])
    assert not waiting.armed


def test_a_step_number_is_the_first_that_counts_and_means_nothing_elsewhere() -> None:
    waiting = Injections(0)
    waiting.replace([Injection(1, 0, "kill", "step", step=5), Injection(2, 0, "kill", "leave", step=5)])
    assert waiting.take(("step", "decode"), 4) is None
    later = waiting.take(("step", "decode"), 9)
    elsewhere = waiting.take(("leave",))
    assert later is not None
    assert elsewhere is not None
    assert (later.number, elsewhere.number) == (1, 2)


def test_logits_are_spoiled_in_a_step() -> None:
    waiting = Injections(0)
    waiting.replace([Injection(1, 0, "nan"), Injection(2, 0, "nan", "decode")])
    assert not waiting.awaits("now")
    assert waiting.awaits("step")
    assert waiting.awaits("decode")


def test_what_is_unknown_is_refused_and_counted() -> None:
    waiting = Injections(0)
    waiting.replace([Injection(1, 0, "melt"), Injection(2, 0, "kill", "lunch"), Injection(3, 0, "hang", "idle")])
    assert waiting.refused == 2
    assert waiting.awaits("idle")


def test_a_fault_is_told_before_it_happens() -> None:
    events: list[object] = []
    waiting = Injections(0)
    injector = FaultInjector(
        waiting,
        tell=lambda one: events.append(one.number),
        finish=lambda code: events.append(f"exit {code}"),
        spoil=lambda: events.append("spoiled"),
    )
    waiting.replace(
        [Injection(1, 0, "nan", "step"), Injection(2, 0, "exit", "leave"), Injection(3, 0, "raise", "step")]
    )
    injector.reach("leave")
    with pytest.raises(InjectedError, match="injected fault 3"):
        injector.reach("step", step=0)
    assert events == [2, "exit 1", 1, "spoiled", 3]
