"""A simulator that cannot fail proves nothing: five bugs, planted in the real code in turn, are each caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from drumline.engine.core.block_pool import I64, BlockPool
from drumline.engine.core.rank_messages import RankMessages
from drumline.engine.core.residence import Residence
from drumline.engine.core.wave import Wave
from drumline.engine.delivery import Delivery
from drumline.engine.journal import Batch
from tests.simulation.cluster.day import run_schedule
from tests.simulation.cluster.schedule import make_schedule
from tests.simulation.worker import RuleBrokenError

MOST_SCHEDULES = 500


def _drop_the_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """What a rank says of an epoch that is over counts for the one that forms."""
    patch.setattr(RankMessages, "current", lambda messages, record, message: True)


def _deliver_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def at_once(delivery: Delivery, batch: Batch | None, send: Callable[[], None]) -> None:
        push(delivery, batch, lambda: None)
        send()

    push = Delivery.push
    patch.setattr(Delivery, "push", at_once)


def _free_blocks_twice(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release

    def twice(pool: BlockPool, replica: int, blocks: I64) -> None:
        release(pool, replica, blocks)
        if len(blocks) > 2:
            release(pool, replica, blocks[:1])

    patch.setattr(BlockPool, "release", twice)


def _reuse_rows_in_flight(patch: pytest.MonkeyPatch) -> None:
    release = Residence.release
    patch.setattr(Residence, "release", lambda self, acknowledged: release(self, [1 << 40] * len(acknowledged)))


def _close_waves_too_early(patch: pytest.MonkeyPatch) -> None:
    settle = Wave.settle
    patch.setattr(Wave, "settle", lambda wave, unfinished, in_flight: settle(wave, unfinished, 0))


PLANTED = [
    _drop_the_epoch_check,
    _deliver_before_the_commit,
    _free_blocks_twice,
    _reuse_rows_in_flight,
    _close_waves_too_early,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught_and_the_seed_that_replays_it_named(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(RuleBrokenError, match=r"seed (\d+) at [^\0]*cluster --seed \1"):
        _run_seeds()


def _run_seeds() -> None:
    for seed in range(MOST_SCHEDULES):
        run_schedule(make_schedule(seed))
