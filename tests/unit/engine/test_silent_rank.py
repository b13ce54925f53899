"""When all that is known of a loss is that ranks waited, the one that they waited for is named."""

from __future__ import annotations

import pytest

from drumline.engine.core.evidence import SETTLE_S
from drumline.engine.core.members import RankState
from drumline.engine.core.membership import Membership
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Fault, StoreReady
from tests.unit.engine.test_membership import TERM, beat, gathered, opened, peer, ready, verdict


def misses(one: Membership, rank: int, awaited: int, now: float, kind: str = "group_timeout") -> None:
    text = f"waited for rank {awaited}"
    one.receive(peer(rank), Fault(TERM, 1, rank, ErrorInfo(kind=kind, text=text, step=9)), now)


@pytest.mark.parametrize("kind", ["peer_lost", "group_timeout"])
def test_who_is_waited_for_and_says_nothing_is_the_cause(kind: str) -> None:
    one = opened()
    misses(one, 0, 1, 3.0, kind)
    loss = verdict(one, 3.0 + SETTLE_S)
    assert (loss.rank, loss.error.rank, loss.error.incarnation, loss.error.step) == (1, 1, "inc-1", 9)
    assert loss.error.text == (
        "rank 1 (pid 1001) says nothing while others wait for it; rank 0 reports: waited for rank 1"
    )
    assert [record.state for record in one.ranks.values()] == [RankState.READY, RankState.DEAD]


def test_of_silent_ranks_the_one_that_is_furthest_behind_is_the_cause() -> None:
    one = gathered([(0, 1, 2, 3)])
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    for rank in range(4):
        one.receive(peer(rank), ready(rank), 2.0)
    for rank, step in enumerate([8, 8, 6, 7]):
        one.receive(peer(rank), beat(rank, step=step), 2.5)
    misses(one, 0, 3, 3.0)
    misses(one, 1, 0, 3.1, "peer_lost")
    assert verdict(one, 3.0 + SETTLE_S).rank == 2


def test_where_all_miss_somebody_the_first_to_say_so_is_named() -> None:
    one = opened()
    misses(one, 1, 0, 3.0, "peer_lost")
    misses(one, 0, 1, 3.1, "peer_lost")
    assert (loss := verdict(one, 3.0 + SETTLE_S)).rank == 1
    assert loss.error.text == "waited for rank 0"


def test_while_an_epoch_forms_a_complaint_stands_as_it_is() -> None:
    one = gathered()
    misses(one, 0, 1, 3.0)
    assert verdict(one, 3.0 + SETTLE_S).rank == 0


def test_ranks_of_another_group_are_not_waited_for() -> None:
    one = gathered([(0, 1), (2,)])
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    for rank in range(3):
        one.receive(peer(rank), ready(rank), 2.0)
    misses(one, 0, 1, 3.0, "peer_lost")
    misses(one, 1, 0, 3.1, "peer_lost")
    assert verdict(one, 3.0 + SETTLE_S).rank == 0
