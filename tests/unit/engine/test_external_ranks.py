"""Ranks that somebody else starts, and ranks that take turns to load, as membership sees them."""

from __future__ import annotations

import msgspec

from drumline.engine.core.evidence import SETTLE_S, Loss
from drumline.engine.core.members import MembershipConfig, ToOwner, ToPeer
from drumline.engine.core.membership import Membership
from drumline.protocol.messages import OpenStore, Spawn, StoreReady
from tests.unit.engine.test_membership import SUPERVISOR, TERM, WORKER, beat, hello, hello_supervisor, peer, verdict

TOKEN = "job-token"


def membership(external: set[int], *, turns: int = 0, store_port: int = 0, groups: int = 1) -> Membership:
    """Three ranks; with ``groups`` 2, rank 2 has a partner, rank 3, in a group of their own."""
    tokens = iter(f"token-{number}" for number in range(9))
    config = MembershipConfig(
        term=TERM,
        groups=[(0, 1, 2)] if groups == 1 else [(0, 1), (2, 3)],
        worker=msgspec.structs.replace(WORKER, max_parallel_loading_workers=turns),
        digest="d1",
        supervisor_token="s3cret",
        start_deadline_s=60.0,
        external_ranks=frozenset(external),
        launch_token=TOKEN,
        store_port=store_port,
    )
    return Membership(config, lambda: next(tokens), now=0.0)


def test_only_the_other_ranks_are_spawned() -> None:
    one = membership({0, 2})
    assert one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0) == [ToOwner(SUPERVISOR, Spawn(1, "token-0"))]
    everyone = membership({0, 1, 2})
    assert everyone.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0) == []


def test_the_token_of_the_job_admits_each_of_its_ranks_once() -> None:
    one = membership({0, 2})
    assert list(one.awaited) == [0, 2]
    assert len(one.worker_hello(peer(0), hello(0, TOKEN), 1.0)) == 1
    assert list(one.awaited) == [2]
    assert one.worker_hello(b"again", hello(0, TOKEN, incarnation="second"), 2.0) == []
    assert one.refusals.duplicate_hello == 1
    assert len(one.worker_hello(peer(2), hello(2, TOKEN), 3.0)) == 1
    assert list(one.awaited) == []


def test_the_token_of_the_job_admits_no_rank_that_is_started_here() -> None:
    one = membership({0, 2})
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    assert one.worker_hello(peer(1), hello(1, TOKEN), 1.0) == []
    assert one.worker_hello(peer(0), hello(0, "token-0"), 1.0) == []
    assert one.refusals.wrong_token == 2


def test_ranks_of_a_job_may_come_before_the_supervisor() -> None:
    one = membership({0, 1, 2})
    for rank in (2, 0):
        assert len(one.worker_hello(peer(rank), hello(rank, TOKEN), 1.0)) == 1
    outputs = one.worker_hello(peer(1), hello(1, TOKEN), 1.0)
    assert outputs[-1] == ToPeer(0, peer(0), OpenStore(TERM, 1, "127.0.0.1", 0))


def test_each_group_has_its_store_at_the_next_port() -> None:
    one = membership({0, 1, 2, 3}, store_port=29500, groups=2)
    for rank in (0, 2):
        one.worker_hello(peer(rank), hello(rank, TOKEN), 1.0)
    for first, port in ((0, 29500), (2, 29501)):
        outputs = one.worker_hello(peer(first + 1), hello(first + 1, TOKEN), 1.0)
        assert outputs[-1] == ToPeer(first, peer(first), OpenStore(TERM, 1, "127.0.0.1", port))


def test_a_rank_that_no_job_starts_is_named_at_the_start_deadline() -> None:
    one = membership({0, 2})
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.worker_hello(peer(0), hello(0, TOKEN), 1.0)
    one.worker_hello(peer(1), hello(1, "token-0"), 1.0)
    for moment in range(5, 60, 5):
        assert not heard(one, (0, 1), float(moment))
    heard(one, (0, 1), 60.9)
    loss = lost(one, 61.0)
    assert loss.rank == 2
    assert "started by a job script" in loss.error.text


def loading_in_turns(turns: int) -> Membership:
    """All three ranks are told to load at 1 s."""
    one = membership({0, 1, 2}, turns=turns)
    for rank in (0, 1, 2):
        one.worker_hello(peer(rank), hello(rank, TOKEN), 1.0)
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 1.0)
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    return one


def test_a_rank_that_waits_for_its_turn_is_not_lost_while_another_loads() -> None:
    one = loading_in_turns(1)
    for moment in range(2, 150, 4):
        one.receive(peer(0), beat(0, moment, 1000), float(moment))
        assert not heard(one, (1, 2), float(moment))


def test_without_turns_the_same_rank_is_lost() -> None:
    one = loading_in_turns(0)
    for moment in range(2, 62, 4):
        one.receive(peer(0), beat(0, moment, 1000), float(moment))
        heard(one, (1, 2), float(moment))
    assert lost(one, 62.0).rank == 1


def test_of_ranks_that_take_turns_the_one_that_stopped_loading_is_lost() -> None:
    one = loading_in_turns(1)
    one.receive(peer(1), beat(1, 900, 1000), 2.0)
    for moment in range(3, 62, 4):
        assert not heard(one, (0, 2), float(moment))
        one.receive(peer(1), beat(1, 900, 1000), float(moment))
    heard(one, (0, 2), 62.5)
    assert lost(one, 62.6).rank == 1


def heard(one: Membership, ranks: tuple[int, ...], now: float) -> bool:
    """These ranks and the supervisor are alive at ``now``; whether anything is suspected."""
    one.owner_heard(now)
    for rank in ranks:
        one.receive(peer(rank), beat(rank, epoch=one.groups[one.ranks[rank].group].epoch), now)
    one.tick(now)
    return one.decides_at is not None


def lost(one: Membership, now: float) -> Loss:
    """The rank that is found lost at ``now``."""
    one.tick(now)
    return verdict(one, now + SETTLE_S)
