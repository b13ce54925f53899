"""Bugs in moving experts, planted in the real code in turn: the simulator catches each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from drumline.engine.core import refit
from drumline.engine.core.balance import balancer, shuffle
from drumline.engine.core.balance.balancer import Balancer
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun
from drumline.engine.core.balance.window import LoadWindow
from drumline.protocol.messages import Staged
from tests.simulation.cluster.day import run_schedule
from tests.simulation.cluster.faults import RankFault
from tests.simulation.cluster.moving import make_moving_schedule
from tests.simulation.cluster.schedule import OtherFault
from tests.simulation.cluster.test_moving_faults import ASKED_AT, FOUR, moving_day
from tests.simulation.worker import RuleBrokenError

MOST_SCHEDULES = 30
Patch = pytest.MonkeyPatch


def _commit_without_all_staged(patch: Patch) -> None:
    staged = ShuffleRun.staged

    def first_speaks_for_all(run: ShuffleRun, message: Staged) -> bool:
        layer = run._layer
        if layer is not None and not message.dropped:
            layer.waiting &= {message.rank}
        return staged(run, message)

    patch.setattr(ShuffleRun, "staged", first_speaks_for_all)


def _home_before_all_have_answered(patch: Patch) -> None:
    step_done = ShuffleRun.step_done

    def first_speaks_for_all(run: ShuffleRun, rank: int, step: int) -> None:
        layer = run._layer
        if layer is not None and step == layer.commit_step:
            layer.waiting &= {rank}
        step_done(run, rank, step)

    patch.setattr(ShuffleRun, "step_done", first_speaks_for_all)


def _next_layer_before_all_have_dropped_this(patch: Patch) -> None:
    staged = ShuffleRun.staged

    def first_speaks_for_all(run: ShuffleRun, message: Staged) -> bool:
        layer = run._layer
        if layer is not None and message.dropped:
            layer.waiting &= {message.rank}
        return staged(run, message)

    patch.setattr(ShuffleRun, "staged", first_speaks_for_all)


def _all_in_one_round(patch: Patch) -> None:
    def at_once(fetches: Any, receivers: Any) -> Any:
        return fetches, np.asarray([0, len(fetches)], dtype=np.int32)

    patch.setattr(shuffle, "pair_rounds", at_once)


def _too_much_beside_a_step(patch: Patch) -> None:
    patch.setattr(Pace, "parts_per_step", property(lambda pace: 100))


def _forget_what_was_committed(patch: Patch) -> None:
    following = Balancer.next

    def forgets(balancer: Balancer, step: int, now: float) -> Any:
        before = balancer.placement
        carried = following(balancer, step, now)
        balancer.placement = before
        return carried

    patch.setattr(Balancer, "next", forgets)


def _copies_from_where_the_expert_is_not(patch: Patch) -> None:
    plans = shuffle.layer_plans

    def off_by_one(*args: Any) -> Any:
        made = plans(*args)
        for plan in made:
            plan.fetches[0, 3] = max(int(plan.fetches[0, 3]) - 1, 0)
        return made

    patch.setattr("drumline.engine.core.balance.balancer.layer_plans", off_by_one)


def _go_on_with_the_plan_of_an_older_epoch(patch: Patch) -> None:
    closed = Balancer.closed

    def keeps(balancer: Balancer, why: str, now: float) -> None:
        asked, balancer._asked = balancer._asked, None
        closed(balancer, why, now)
        balancer._asked = asked

    patch.setattr(Balancer, "closed", keeps)


def _take_the_load_for_that_of_the_newest_placement(patch: Patch) -> None:
    commit = LoadWindow.commit

    def at_once(window: LoadWindow, step: int, placement: Any) -> None:
        window._versions.clear()
        commit(window, -1, placement)

    patch.setattr(LoadWindow, "commit", at_once)


def _read_from_disk_what_staging_buffers_hold(patch: Patch) -> None:
    patch.setattr(refit, "_spare", lambda record, layers: np.zeros((layers, 0), dtype=np.int32))


def _plan_as_if_nothing_had_moved(patch: Patch) -> None:
    """The refit after a fault starts from what ranks loaded."""
    initial: dict[int, Any] = {}

    def loaded(record: Any, layers: int) -> Any:
        held = record.left.held if record.left is not None else np.zeros((layers, 0), dtype=np.int32)
        return initial.setdefault(record.incarnation, held[:, : held.shape[1] - record.left.spare])

    patch.setattr(refit, "_held", loaded)


PLANTED: Sequence[Callable[[Patch], None]] = [
    _commit_without_all_staged,
    _home_before_all_have_answered,
    _all_in_one_round,
    _too_much_beside_a_step,
    _forget_what_was_committed,
    _copies_from_where_the_expert_is_not,
    _take_the_load_for_that_of_the_newest_placement,
    _read_from_disk_what_staging_buffers_hold,
    _plan_as_if_nothing_had_moved,
]


def _run_seeds() -> None:
    for seed in range(MOST_SCHEDULES):
        run_schedule(make_moving_schedule(seed))


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught_and_the_seed_that_replays_it_named(
    plant: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    with pytest.raises(RuleBrokenError, match=r"seed (\d+) at [^\0]*cluster --experts --seed \1"):
        _run_seeds()


def test_a_layer_that_is_staged_before_all_have_dropped_the_one_before_is_caught(monkeypatch: Patch) -> None:
    _next_layer_before_all_have_dropped_this(monkeypatch)
    superseded = [OtherFault("given_rebalance", ASKED_AT + 0.15 * number) for number in range(1, 10)]
    day = moving_day(FOUR, *superseded, plan_s=0.01, transfer_s=0.3)
    with pytest.raises(RuleBrokenError, match="is under way"):
        day.run()


def test_a_plan_that_outlives_its_epoch_is_caught(monkeypatch: Patch) -> None:
    _go_on_with_the_plan_of_an_older_epoch(monkeypatch)
    # Nothing of it would be left over by the look that is taken at every plan.
    monkeypatch.setattr(balancer, "wrong_with", lambda *_: "")
    day = moving_day(FOUR, RankFault("kill", 2, ASKED_AT - 1.0, "planning"), plan_s=0.5)
    with pytest.raises((RuleBrokenError, IndexError)):
        day.run()
