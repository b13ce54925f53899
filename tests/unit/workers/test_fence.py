from __future__ import annotations

import numpy as np
import pytest

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Step
from drumline.workers.fence import Fence

NONE = np.zeros(0, dtype=np.int32)


def step(number: int, *, term: int = 1, epoch: int = 1, wave: int = 0) -> Step:
    return Step(term, epoch, wave, number, NONE, NONE, (), NONE, NONE, NONE, NONE)


@pytest.fixture
def fence() -> Fence:
    made = Fence()
    assert made.enter(1, 1)
    return made


def test_steps_are_admitted_in_order(fence: Fence) -> None:
    assert [fence.admit(step(number)) for number in range(3)] == [True] * 3


def test_a_skipped_step_is_refused_with_both_numbers(fence: Fence) -> None:
    fence.admit(step(0))
    with pytest.raises(ProtocolError, match="step 2 found, step 1 is the next") as caught:
        fence.admit(step(2))
    assert (caught.value.info.epoch, caught.value.info.step) == (1, 2)


def test_a_second_copy_of_a_step_is_dropped_and_counted(fence: Fence) -> None:
    assert fence.admit(step(0))
    assert not fence.admit(step(0))
    assert fence.admit(step(1))
    assert fence.stale == 1


def test_older_epochs_and_terms_are_dropped_and_counted(fence: Fence) -> None:
    assert fence.enter(2, 1)
    assert not fence.admit(step(0, term=1, epoch=9))
    assert not fence.enter(1, 5)
    assert not fence.enter(2, 1)
    assert fence.is_stale(1, 1)
    assert not fence.is_stale(2, 1)
    assert fence.stale == 4
    assert fence.admit(step(0, term=2, epoch=1))


def test_a_step_of_an_epoch_that_was_never_configured_is_refused(fence: Fence) -> None:
    with pytest.raises(ProtocolError, match=r"epoch \(1, 2\) is not configured; in force: \(1, 1\)"):
        fence.admit(step(0, epoch=2))


def test_a_wave_does_not_go_back(fence: Fence) -> None:
    fence.admit(step(0, wave=3))
    with pytest.raises(ProtocolError, match="wave 2 found after wave 3"):
        fence.admit(step(1, wave=2))


def test_a_broken_epoch_drops_its_steps_until_the_next(fence: Fence) -> None:
    fence.break_epoch()
    assert not fence.admit(step(0))
    assert not fence.admit(step(7))
    assert fence.stale == 2
    fence.enter(1, 2)
    assert fence.admit(step(0, epoch=2))
