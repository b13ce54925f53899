"""How an engine starts, message by message, and who is refused on the way."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.decisions import Ended, EpochReady, Leased, Loading, Output, ToOwner, ToPeer
from drumline.engine.core.losses import SETTLE_S
from drumline.engine.core.members import RankState
from drumline.engine.core.membership import Membership
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    BeatWorker,
    Configure,
    Exited,
    Fault,
    HelloSupervisor,
    HelloWorker,
    Kill,
    Leave,
    Left,
    Load,
    Loaded,
    Member,
    OpenStore,
    Ready,
    Shutdown,
    Spawn,
    Spawned,
    StepDone,
    StoreReady,
    WelcomeWorker,
)
from tests.unit.core.fake_ranks import DIGEST, FREE, NOTHING, SECRET, SUPERVISOR, WORKER, FakeRanks, config

EMPTY = np.zeros(0, dtype=np.int32)


def membership() -> Membership:
    tokens = iter(f"token-{number}" for number in range(100))
    return Membership(config(), lambda: next(tokens), now=0.0)


def hello_supervisor(token: str = SECRET, version: int = PROTOCOL_VERSION) -> HelloSupervisor:
    return HelloSupervisor(version, token, 77)


def hello(rank: int, token: str | None = None, incarnation: str = "", version: int = PROTOCOL_VERSION) -> HelloWorker:
    shown = token if token is not None else f"token-{rank}"
    return HelloWorker(version, shown, rank, incarnation or f"inc-{rank}", 1000 + rank, "127.0.0.1")


def peer(rank: int) -> bytes:
    return b"peer-%d" % rank


def to_peers(outputs: list[Output]) -> list[tuple[int, str]]:
    return [(output.rank, type(output.message).__name__) for output in outputs if isinstance(output, ToPeer)]


def test_a_start_of_two_ranks_is_these_messages_in_this_order() -> None:
    one = membership()
    spawns = one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    assert spawns == [ToOwner(SUPERVISOR, Spawn(0, "token-0")), ToOwner(SUPERVISOR, Spawn(1, "token-1"))]
    assert one.supervisor_pid == 77
    one.spawned(Spawned(0, 1000))

    welcome = WelcomeWorker(PROTOCOL_VERSION, 5, DIGEST, WORKER)
    for rank in (0, 1):
        greeted = one.receive(peer(rank), hello(rank), 1.0)
        assert greeted[0] == ToPeer(rank, peer(rank), welcome)
        load = greeted[1].message  # type: ignore[union-attr]
        assert isinstance(load, Load)
        assert load.experts.tolist() == [[4 * rank + e for e in range(4)]] * 2
    loaded = Loaded(5, 0, DIGEST, 9, 4096, 1 << 20, 0.5, "cpu", FREE)
    assert one.receive(peer(0), BeatWorker(5, 0, 0, 0, 0, False, 1 << 20, 1 << 20), 1.9) == [
        Loading(0, 1 << 20, 1 << 20)
    ]
    assert one.receive(peer(0), loaded, 2.0) == []
    assert one.ranks[0].state is RankState.PARKED
    outputs = one.receive(peer(1), Loaded(5, 1, DIGEST, 10, 4096, 1 << 20, 0.5, "cpu", FREE), 2.1)
    assert outputs == [
        Loading(1, 1 << 20, 1 << 20),
        ToPeer(0, peer(0), Leave(5, 1)),
        ToPeer(1, peer(1), Leave(5, 1)),
    ]
    held = [np.arange(4 * rank, 4 * rank + 4, dtype=np.int32)[None].repeat(2, axis=0) for rank in (0, 1)]
    assert one.receive(peer(1), Left(5, 1, 1, held[1], 10, FREE), 2.2) == []
    assert one.receive(peer(0), Left(5, 1, 0, held[0], 9, FREE), 2.2) == [
        ToPeer(0, peer(0), OpenStore(5, 1, "127.0.0.1"))
    ]
    configures = one.receive(peer(0), StoreReady(5, 1, 0, "127.0.0.1", 4242), 2.3)
    for output in configures:
        assert isinstance(output, ToPeer)
        configure = output.message
        assert isinstance(configure, Configure)
        assert (configure.term, configure.epoch, configure.role, configure.parked) == (5, 1, "compute", ())
        assert configure.members == (Member(0, "inc-0"), Member(1, "inc-1"))
        assert (configure.store_host, configure.store_port) == ("127.0.0.1", 4242)
        assert configure.placement.tolist() == [list(range(8))] * 2
        assert configure.slots.tolist() == [4, 4]
        assert configure.fetches.shape == (0, 4)
    assert [output.rank for output in configures if isinstance(output, ToPeer)] == [0, 1]
    assert one.receive(peer(1), Ready(5, 1, 1, DIGEST, 10, 4096, 1 << 20, 0.5), 2.4) == []
    assert not one.all_ready
    opened = one.receive(peer(0), Ready(5, 1, 0, DIGEST, 9, 4096, 1 << 20, 0.5), 2.5)
    assert opened == [EpochReady(0, 1, {0: 9, 1: 10}, (0, 1), ())]
    assert one.all_ready
    assert {record.state for record in one.ranks.values()} == {RankState.READY}


def test_a_dense_rank_alone_in_its_group_needs_no_store_and_waits_for_nobody() -> None:
    ranks = FakeRanks(config(Layout(2), dense=True))
    ranks.slow = {0}
    ranks.start()
    assert not ranks.said(OpenStore)
    (configure,) = ranks.said(Configure)
    assert configure.placement.shape == (0, 0)
    assert ranks.said(Load)[0].experts.shape == (0, 0)
    assert ranks.said(EpochReady) == [EpochReady(1, 1, {1: 10}, (0,), ())]
    assert not ranks.membership.all_ready


def test_a_wrong_token_admits_nobody_and_is_told_why() -> None:
    one = membership()
    assert one.supervisor_hello(b"x", hello_supervisor(token="guess"), 0.0) == []
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    for shown in (hello(0, token=""), hello(0, token="token-1"), hello(17, token="t"), hello(0, token="tök\U0001f511")):
        (output,) = one.worker_hello(b"x", shown, 0.0)
        assert isinstance(output, ToPeer)
        assert isinstance(output.message, Shutdown)
        why = "the world has ranks 0 to 1" if shown.rank == 17 else "wrong launch token"
        assert why in output.message.reason
    assert one.refusals.wrong_token == 5


def test_a_rank_that_says_hello_before_the_supervisor_waits_for_it() -> None:
    one = membership()
    assert one.worker_hello(peer(1), hello(1), 0.0) == []
    outputs = one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    assert to_peers(outputs) == [(1, "WelcomeWorker"), (1, "Load")]


def test_a_token_admits_one_incarnation_only() -> None:
    ranks = FakeRanks().start()
    process, one = ranks.processes[0], ranks.membership
    assert one.worker_hello(process.peer, hello(0, process.token, process.incarnation), 2.0) == []
    (output,) = one.worker_hello(b"other", hello(0, process.token, incarnation="second"), 2.0)
    assert isinstance(output, ToPeer)
    assert isinstance(output.message, Shutdown)
    assert f"it is there already, as process {process.pid}" in output.message.reason
    assert one.supervisor_hello(b"other", hello_supervisor(), 2.0) == []
    assert one.refusals.duplicate_hello == 3
    assert one.ranks[0].incarnation == process.incarnation


def test_only_the_supervisor_that_said_hello_speaks_for_it() -> None:
    ranks = FakeRanks().start()
    assert ranks.membership.is_owner(SUPERVISOR)
    assert not ranks.membership.is_owner(b"other")
    assert ranks.membership.refusals.unknown_peer == 1


def test_strangers_impostors_and_the_past_are_dropped_and_counted() -> None:
    ranks = FakeRanks().start()
    one, mine, other = ranks.membership, ranks.processes[0].peer, ranks.processes[1].peer
    done = StepDone(5, 1, 0, 3, EMPTY, EMPTY)
    assert one.accepts(mine, done)
    assert not one.accepts(b"stranger", done)
    assert not one.accepts(other, done)
    assert not one.accepts(mine, StepDone(5, 0, 0, 3, EMPTY, EMPTY))
    assert not one.accepts(mine, StepDone(4, 1, 0, 3, EMPTY, EMPTY))
    assert not one.accepts(mine, StepDone(4, 2, 0, 3, EMPTY, EMPTY))
    refusals = one.refusals.as_dict()
    assert (refusals["unknown_peer"], refusals["foreign_rank"], refusals["stale"]) == (1, 1, 3)


def test_messages_out_of_order_are_dropped_and_counted() -> None:
    ranks = FakeRanks().start()
    store = StoreReady(5, 1, 0, "127.0.0.1", 9)
    ready = Ready(5, 1, 0, DIGEST, 9, 4096, 1000, 0.5)
    for message in (store, ready, Left(5, 1, 0, NOTHING, 9), ranks.loaded(ranks.processes[0])):
        assert ranks.say(0, message) == []
    assert ranks.membership.refusals.out_of_order == 4
    assert ranks.membership.all_ready


@pytest.mark.parametrize(("digest", "blocks", "text"), [("d2", 9, "config digest d2"), (DIGEST, 0, "0 KV blocks")])
def test_a_rank_that_has_loaded_something_else_ends_the_start(digest: str, blocks: int, text: str) -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    (ended,) = ranks.say(1, Loaded(5, 1, digest, blocks, 4096, 1000, 0.5, "cpu"))
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert (ended.error.kind, ended.error.rank) == ("start_failed", 1)
    assert text in ended.reason
    assert ranks.membership.tick(100.0) == []


def test_another_protocol_version_is_named() -> None:
    one = membership()
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    (ended,) = one.worker_hello(peer(0), hello(0, version=99), 0.0)
    assert isinstance(ended, Ended)
    assert "version 99" in ended.reason
    (ended,) = membership().supervisor_hello(SUPERVISOR, hello_supervisor(version=99), 0.0)
    assert isinstance(ended, Ended)


def test_load_progress_is_told_once_per_change_and_puts_the_deadline_off() -> None:
    ranks = FakeRanks()
    ranks.slow = {0, 1}
    ranks.start()
    for now in range(5, 200, 5):
        ranks.now = float(now)
        progress = BeatWorker(5, 0, 0, 0, 0, False, now, 1000)
        assert ranks.say(0, progress) == [Loading(0, now, 1000)]
        assert ranks.say(0, progress) == []
        assert ranks.say(1, BeatWorker(5, 0, 1, 0, 0, False, now, 1000)) == [Loading(1, now, 1000)]
        ranks.membership.owner_heard(ranks.now)
        assert ranks.membership.tick(ranks.now) == []


def test_who_never_says_hello_ends_the_start_at_its_deadline() -> None:
    one = membership()
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.worker_hello(b"x", hello(1, "guess"), 0.5)
    one.worker_hello(peer(0), hello(0), 1.0)
    one.receive(peer(0), Loaded(5, 0, DIGEST, 9, 4096, 1000, 0.5, "cpu"), 1.0)
    for now in range(1, 60):
        one.receive(peer(0), BeatWorker(5, 0, 0, 0, 0, False), float(now))
        one.owner_heard(float(now))
        assert one.tick(float(now)) == []
    assert one.due_at == 60.0
    (ended,) = one.tick(60.0)
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert (ended.error.kind, ended.error.rank) == ("start_failed", 1)
    assert "has not said Hello; 1 Hellos came with a wrong launch token" in ended.reason


def test_of_ranks_that_make_no_progress_the_one_that_loaded_least_is_named() -> None:
    ranks = FakeRanks()
    ranks.slow = {0, 1}
    ranks.start()
    for now in range(0, 60, 5):
        ranks.now = float(now)
        for rank, done in ((0, 90), (1, 40)):
            ranks.say(rank, BeatWorker(5, 0, rank, 0, 0, False, done, 100))
        ranks.membership.owner_heard(ranks.now)
    (ended,) = ranks.membership.tick(60.0)
    assert isinstance(ended, Ended)
    assert ended.reason.startswith("rank 1 ")
    assert "40 of 100 bytes" in ended.reason


def test_a_missing_and_a_silent_supervisor_are_fatal() -> None:
    one = membership()
    assert one.tick(59.9) == []
    (ended,) = one.tick(60.0)
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert ended.error.kind == "start_failed"
    ranks = FakeRanks().start()
    (ended,) = [output for output in ranks.membership.tick(10.0) if isinstance(output, Ended)]
    assert ended.error is not None
    assert ended.error.kind == "engine_closed"


def test_a_rank_that_cannot_load_is_quoted_in_its_own_words_though_its_exit_is_told_first() -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    ranks.forget()
    ranks.now = 3.0
    ranks.kill(1, signal=0, code=1)
    assert ranks.out == []
    error = ErrorInfo(kind="invalid_config", text="no room", field="kv", found="1", valid="2", traceback="tb")
    (ended,) = ranks.say(1, Fault(0, 0, 1, error))
    assert isinstance(ended, Ended)
    assert ended.error is not None
    assert (ended.error.kind, ended.error.traceback, ended.error.field) == ("start_failed", "tb", "kv")


def test_a_start_ends_with_a_process_that_ends_with_a_status() -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    ranks.forget()
    ranks.kill(1, signal=0, code=1)
    assert ranks.membership.due_at == SETTLE_S
    (ended,) = ranks.membership.tick(SETTLE_S)
    assert isinstance(ended, Ended)
    assert "ended with code 1; its last output: last words" in ended.reason


def test_a_start_survives_a_process_that_is_killed() -> None:
    ranks = FakeRanks()
    ranks.slow = {1}
    ranks.start()
    ranks.kill(1, signal=9)
    assert len(ranks.said(Spawn)) == 3
    assert not ranks.said(Ended)
    ranks.load(1)
    assert ranks.said(EpochReady) == [EpochReady(0, 1, {0: 9, 1: 10}, (0, 1), ())]


def test_the_exit_of_a_process_that_is_not_the_ranks_is_ignored() -> None:
    ranks = FakeRanks().start()
    assert ranks.membership.exited(Exited(1, 555, 0, 9), 3.0) == []
    assert ranks.membership.exited(Exited(40, 1001, 0, 9), 3.0) == []
    assert ranks.membership.refusals.foreign_rank == 2


def test_a_process_that_was_told_of_too_late_is_killed() -> None:
    one = membership()
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.exited(Exited(1, 0, 0, 9), 1.0)  # whatever became of the first one, another is ordered
    one.spawned(Spawned(1, 50))
    assert one.tick(1.0) == [ToOwner(SUPERVISOR, Kill(1, 50))]
    one.spawned(Spawned(1, 51))
    assert one.ranks[1].pid == 51


def test_a_lease_is_passed_on_until_it_is_given_back() -> None:
    ranks = FakeRanks().start()
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 1, False, lease_s=30.0)) == [Leased(0, 0, 3, 30.0)]
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 2, True)) == [Leased(0, 0, 3, 0.0)]
    assert ranks.say(0, BeatWorker(5, 1, 0, 4, 2, True)) == []


def test_a_rank_that_waits_for_others_does_not_lengthen_their_time() -> None:
    ranks = FakeRanks().start()
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 1, False, lease_s=30.0)) == [Leased(0, 0, 3, 30.0)]
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 2, True, lease_s=29.0)) == [Leased(0, 0, 3, 0.0)]
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 2, True, lease_s=28.0)) == []
    assert ranks.say(0, BeatWorker(5, 1, 0, 3, 2, False, lease_s=27.0)) == [Leased(0, 0, 3, 27.0)]


def test_a_fault_of_a_start_that_only_misses_a_peer_begins_the_next_epoch() -> None:
    ranks = FakeRanks()
    ranks.deaf[1] = {Configure}
    ranks.start()
    assert not ranks.said(EpochReady)
    ranks.processes[1].mute.clear()
    ranks.fault(0, "group_timeout", "rank 1 did not come")
    assert not ranks.said(Ended)
    assert [ready.epoch for ready in ranks.said(EpochReady)] == [2]
