"""How an engine starts, message by message, and who is refused or lost on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from drumline.engine.core.evidence import SETTLE_S, Loss
from drumline.engine.core.members import EpochReady, Loading, MembershipConfig, Output, RankState, ToOwner, ToPeer
from drumline.engine.core.membership import SILENCE_S, Membership
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    BeatWorker,
    Configure,
    Exited,
    Fault,
    HelloSupervisor,
    HelloWorker,
    Member,
    OpenStore,
    Ready,
    Spawn,
    Spawned,
    StepDone,
    StoreReady,
    WelcomeWorker,
    WorkerConfig,
)

WORKER = WorkerConfig(
    model="/m",
    dtype="float32",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=0,
    kv_cache_memory_bytes=0,
    gpu_memory_utilization=0.9,
    data_parallel_size=2,
)
TERM = 5
SUPERVISOR = b"supervisor"
PLACEMENT = np.arange(8, dtype=np.int32).reshape(2, 4)
EMPTY = np.zeros(0, dtype=np.int32)


def membership(groups: Sequence[Sequence[int]] = ((0, 1),), start_deadline_s: float = 60.0) -> Membership:
    tokens = iter(f"token-{number}" for number in range(100))
    config = MembershipConfig(
        term=TERM,
        groups=groups,
        worker=WORKER,
        digest="d1",
        supervisor_token="s3cret",
        placements={0: PLACEMENT},
        start_deadline_s=start_deadline_s,
    )
    return Membership(config, lambda: next(tokens), now=0.0)


def hello_supervisor(token: str = "s3cret", version: int = PROTOCOL_VERSION) -> HelloSupervisor:
    return HelloSupervisor(version, token, 77)


def hello(rank: int, token: str | None = None, incarnation: str = "", version: int = PROTOCOL_VERSION) -> HelloWorker:
    shown = token if token is not None else f"token-{rank}"
    return HelloWorker(version, shown, rank, incarnation or f"inc-{rank}", 1000 + rank, "127.0.0.1")


def peer(rank: int) -> bytes:
    return b"peer-%d" % rank


def ready(rank: int, digest: str = "d1", num_blocks: int = 9, epoch: int = 1, term: int = TERM) -> Ready:
    return Ready(term, epoch, rank, digest, num_blocks + rank, 4096, 1 << 20, 0.5)


def beat(rank: int, done: int = 0, total: int = 0, epoch: int = 1, step: int = 0) -> BeatWorker:
    return BeatWorker(TERM, epoch, rank, step, 0, False, done, total)


def outputs_of(outputs: list[Output]) -> list[tuple[object, ...]]:
    """Outputs as plain tuples; arrays are compared apart."""
    shown: list[tuple[object, ...]] = []
    for output in outputs:
        if isinstance(output, ToPeer) and isinstance(output.message, Configure):
            shown.append((output.rank, output.peer, "Configure"))
        elif isinstance(output, ToPeer | ToOwner):
            shown.append((output.peer, output.message))
        else:
            shown.append((output,))
    return shown


def gathered(groups: Sequence[Sequence[int]] = ((0, 1),)) -> Membership:
    """All ranks have said Hello."""
    one = membership(groups)
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    for rank in one.ranks:
        one.worker_hello(peer(rank), hello(rank), 1.0)
    return one


def opened() -> Membership:
    """Both ranks of one group are ready."""
    one = gathered()
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    for rank in (0, 1):
        one.receive(peer(rank), ready(rank), 2.0)
    assert one.all_ready
    return one


def verdict(one: Membership, now: float) -> Loss:
    (output,) = one.tick(now)
    assert isinstance(output, Loss)
    return output


def test_a_start_of_two_ranks_is_these_messages_in_this_order() -> None:
    one = membership()
    spawns = one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    assert spawns == [ToOwner(SUPERVISOR, Spawn(0, "token-0")), ToOwner(SUPERVISOR, Spawn(1, "token-1"))]
    assert one.supervisor_pid == 77
    one.spawned(Spawned(0, 1000))

    welcome = WelcomeWorker(PROTOCOL_VERSION, TERM, "d1", WORKER)
    assert one.receive(peer(0), hello(0), 1.0) == [ToPeer(0, peer(0), welcome)]
    assert one.receive(peer(1), hello(1), 1.1) == [
        ToPeer(1, peer(1), welcome),
        ToPeer(0, peer(0), OpenStore(TERM, 1, "127.0.0.1")),
    ]

    configures = one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.2)
    assert outputs_of(configures) == [(0, peer(0), "Configure"), (1, peer(1), "Configure")]
    for output in configures:
        assert isinstance(output, ToPeer)
        configure = output.message
        assert isinstance(configure, Configure)
        assert (configure.term, configure.epoch, configure.role) == (TERM, 1, "compute")
        assert configure.members == (Member(0, "inc-0"), Member(1, "inc-1"))
        assert (configure.store_host, configure.store_port) == ("127.0.0.1", 4242)
        assert (configure.placement == PLACEMENT).all()

    assert one.receive(peer(0), beat(0, 1 << 20, 1 << 20), 1.9) == [Loading(0, 1 << 20, 1 << 20)]
    assert one.receive(peer(1), ready(1), 2.0) == [Loading(1, 1 << 20, 1 << 20)]
    assert not one.all_ready
    assert one.receive(peer(0), ready(0), 2.1) == [EpochReady(0, 1, (9, 10))]
    assert one.all_ready
    assert {record.state for record in one.ranks.values()} == {RankState.READY}


def test_a_rank_alone_in_its_group_needs_no_store_and_waits_for_nobody() -> None:
    one = membership(groups=((0,), (1,)))
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    outputs = one.worker_hello(peer(1), hello(1), 1.0)
    assert len(outputs) == 2
    configure = outputs[1]
    assert isinstance(configure, ToPeer)
    assert isinstance(configure.message, Configure)
    assert (configure.message.store_host, configure.message.store_port) == ("", 0)
    assert configure.message.placement.shape == (0, 0)
    assert one.receive(peer(1), ready(1), 2.0) == [Loading(1, 1 << 20, 1 << 20), EpochReady(1, 1, (10,))]
    assert not one.all_ready


def test_a_wrong_token_admits_nobody() -> None:
    one = membership()
    assert one.supervisor_hello(b"x", hello_supervisor(token="guess"), 0.0) == []
    assert one.worker_hello(b"x", hello(0), 0.0) == []  # nothing has been spawned, so no token is valid yet
    assert one.worker_hello(b"x", hello(0, token=""), 0.0) == []
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    assert one.worker_hello(b"x", hello(0, token="token-1"), 0.0) == []
    assert one.worker_hello(b"x", hello(17, token="token-1"), 0.0) == []
    assert one.worker_hello(b"x", hello(0, token="tök\U0001f511"), 0.0) == []
    assert one.refusals.wrong_token == 6
    assert one.tick(1.0) == []


def test_a_token_admits_one_incarnation_only() -> None:
    one = gathered()
    assert one.worker_hello(b"other", hello(0, incarnation="second"), 2.0) == []
    assert one.worker_hello(peer(0), hello(0), 2.0) == []
    assert one.supervisor_hello(b"other", hello_supervisor(), 2.0) == []
    assert one.refusals.duplicate_hello == 3
    assert one.ranks[0].incarnation == "inc-0"


def test_only_the_supervisor_that_said_hello_speaks_for_it() -> None:
    one = gathered()
    assert one.is_owner(SUPERVISOR)
    assert not one.is_owner(b"other")
    assert one.refusals.unknown_peer == 1


def test_strangers_impostors_and_the_past_are_dropped_and_counted() -> None:
    one = opened()
    done = StepDone(TERM, 1, 0, 3, EMPTY, EMPTY)
    assert one.accepts(peer(0), done)
    assert not one.accepts(b"stranger", done)
    assert not one.accepts(peer(1), done)
    assert not one.accepts(peer(0), StepDone(TERM, 0, 0, 3, EMPTY, EMPTY))
    assert not one.accepts(peer(0), StepDone(TERM - 1, 1, 0, 3, EMPTY, EMPTY))
    assert not one.accepts(peer(0), StepDone(TERM - 1, 2, 0, 3, EMPTY, EMPTY))
    assert one.refusals.as_dict() == {
        "wrong_token": 0,
        "duplicate_hello": 0,
        "unknown_peer": 1,
        "foreign_rank": 1,
        "stale": 3,
        "out_of_order": 0,
    }


def test_messages_out_of_order_are_dropped_and_counted() -> None:
    one = gathered()
    assert one.receive(peer(1), StoreReady(TERM, 1, 1, "127.0.0.1", 1), 1.0) == []
    assert one.receive(peer(0), ready(0), 1.0) == []
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    assert one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 9), 1.0) == []
    one.receive(peer(0), ready(0), 1.0)
    assert one.receive(peer(0), ready(0), 1.0) == []
    assert one.refusals.out_of_order == 4


@pytest.mark.parametrize(
    ("message", "text"),
    [(ready(1, digest="d2"), "config digest d2"), (ready(1, num_blocks=-1), "0 KV blocks")],
)
def test_a_rank_that_is_ready_for_something_else_is_lost(message: Ready, text: str) -> None:
    one = gathered()
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    assert one.receive(peer(1), message, 1.0) == []
    loss = verdict(one, 1.0)
    assert loss.rank == 1
    assert text in loss.error.text


def test_another_protocol_version_is_named() -> None:
    one = membership()
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.worker_hello(peer(0), hello(0, version=99), 0.0)
    assert "version 99" in verdict(one, 0.0).error.text
    two = membership()
    two.supervisor_hello(SUPERVISOR, hello_supervisor(version=99), 0.0)
    assert verdict(two, 0.0).rank == -1


def test_load_progress_is_told_once_per_change_and_puts_the_deadline_off() -> None:
    one = gathered()
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    assert one.receive(peer(0), beat(0, 10, 100), 40.0) == [Loading(0, 10, 100)]
    assert one.receive(peer(0), beat(0, 10, 100), 45.0) == []
    one.receive(peer(1), beat(1, 5, 100), 45.0)
    one.owner_heard(50.0)
    assert one.tick(54.9) == []


def test_beats_before_the_first_epoch_are_signs_of_life() -> None:
    one = membership()
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.worker_hello(peer(0), hello(0), 0.0)
    one.receive(peer(0), BeatWorker(-1, -1, 0, -1, 0, False), 8.0)
    one.owner_heard(8.0)
    assert one.refusals.stale == 0
    assert one.tick(SILENCE_S + 1.0) == []


def test_who_never_says_hello_is_lost_at_the_start_deadline() -> None:
    one = membership(start_deadline_s=30.0)
    one.supervisor_hello(SUPERVISOR, hello_supervisor(), 0.0)
    one.worker_hello(peer(0), hello(0), 1.0)
    for now in range(1, 31):
        one.receive(peer(0), BeatWorker(TERM, 0, 0, 0, 0, False), float(now))
        one.owner_heard(float(now))
        assert one.tick(float(now)) == []
    assert one.tick(30.5) == []
    loss = verdict(one, 30.5 + SETTLE_S)
    assert (loss.rank, loss.error.kind) == (1, "start_failed")
    assert "has not said Hello" in loss.error.text


def test_of_ranks_that_make_no_progress_the_one_that_loaded_least_is_lost() -> None:
    one = gathered()
    one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 1.0)
    one.receive(peer(0), beat(0, 100, 100), 2.0)
    one.receive(peer(1), beat(1, 40, 100), 2.0)
    one.owner_heard(62.0)
    for rank in (0, 1):
        one.receive(peer(rank), beat(rank, 100 - 60 * rank, 100), 62.0)
    assert one.tick(62.5) == []
    loss = verdict(one, 63.0)
    assert loss.rank == 1
    assert "40 of 100 bytes" in loss.error.text


def test_a_silent_rank_is_lost() -> None:
    one = opened()
    one.receive(peer(0), beat(0, step=4), 12.0)
    one.owner_heard(12.0)
    assert one.tick(12.5) == []
    loss = verdict(one, 13.0)
    assert (loss.rank, loss.error.kind, loss.error.incarnation, loss.error.epoch) == (1, "request_failed", "inc-1", 1)
    assert "not been heard for 10 s" in loss.error.text


def test_a_missing_and_a_silent_supervisor_are_fatal() -> None:
    one = membership(start_deadline_s=20.0)
    assert one.tick(19.0) == []
    assert verdict(one, 21.0).error.kind == "start_failed"
    two = gathered()
    loss = verdict(two, 11.0)
    assert (loss.rank, loss.error.kind) == (-1, "engine_closed")


def test_a_killed_rank_is_named_at_once_though_its_peer_complained_first() -> None:
    one = opened()
    broken = ErrorInfo(kind="internal", text="connection reset by peer", traceback="gloo")
    one.receive(peer(0), Fault(TERM, 1, 0, broken), 3.0)
    assert one.tick(3.0) == []
    one.exited(Exited(1, 1001, 0, 9), 3.05)
    loss = verdict(one, 3.05)
    assert loss.rank == 1
    assert "signal 9 (SIGKILL)" in loss.error.text
    assert one.ranks[1].state is RankState.DEAD
    assert one.tick(9.0) == []


def test_a_rank_that_reports_and_exits_is_quoted_in_its_own_words() -> None:
    one = gathered()
    error = ErrorInfo(kind="invalid_config", text="no room", field="kv", found="1", valid="2", traceback="tb")
    # The exit is told by the supervisor, the fault by the worker: either may come first.
    one.exited(Exited(1, 1001, 1, 0, "Traceback\nno room"), 3.0)
    assert one.tick(3.0) == []
    one.receive(peer(1), Fault(TERM, 1, 1, error), 3.1)
    loss = verdict(one, 3.0 + SETTLE_S)
    assert loss.rank == 1
    assert (loss.error.kind, loss.error.traceback, loss.error.field) == ("invalid_config", "tb", "kv")


def test_a_fault_alone_is_the_cause_after_a_moment() -> None:
    one = gathered()
    one.receive(peer(1), Fault(0, 0, 1, ErrorInfo(kind="internal", text="broken file")), 3.0)
    one.receive(peer(0), Fault(TERM, 1, 0, ErrorInfo(kind="internal", text="peer left")), 3.1)
    loss = verdict(one, 3.0 + SETTLE_S)
    assert (loss.rank, loss.error.text, loss.error.incarnation) == (1, "broken file", "inc-1")
    assert one.ranks[1].last_fault == "broken file"


@pytest.mark.parametrize("kind", ["peer_lost", "group_timeout", "store", "epoch_aborted"])
def test_who_only_misses_a_peer_is_not_the_cause_though_it_complains_first(kind: str) -> None:
    one = opened()
    one.receive(peer(0), Fault(TERM, 1, 0, ErrorInfo(kind=kind, text="rank 1 is gone")), 3.0)
    one.receive(peer(1), Fault(TERM, 1, 1, ErrorInfo(kind="numeric", text="logits are NaN")), 3.1)
    loss = verdict(one, 3.0 + SETTLE_S)
    assert (loss.rank, loss.error.text) == (1, "logits are NaN")


def test_the_exit_of_a_process_that_is_not_the_ranks_is_ignored() -> None:
    one = opened()
    one.exited(Exited(1, 555, 0, 9), 3.0)
    one.exited(Exited(40, 1001, 0, 9), 3.0)
    assert one.tick(3.0) == []
    assert one.refusals.foreign_rank == 2


def test_a_death_tells_the_last_line_of_its_stderr() -> None:
    one = gathered()
    one.exited(Exited(0, 1000, 1, 0, "warning: x\nMemoryError: out of memory\n"), 3.0)
    loss = verdict(one, 3.0 + SETTLE_S)
    assert "ended with code 1" in loss.error.text
    assert "MemoryError: out of memory" in loss.error.text
    assert loss.error.traceback.startswith("warning: x")


def test_nothing_is_sent_to_the_dead() -> None:
    one = opened()
    one.exited(Exited(1, 1001, 0, 11), 3.0)
    assert one.ranks[1].peer is None
    assert not one.accepts(peer(1), StepDone(TERM, 1, 1, 0, EMPTY, EMPTY))


def test_a_later_epoch_forms_with_the_same_ranks_and_fences_the_former() -> None:
    one = opened()
    assert outputs_of(one.epochs.begin(0, 5.0)) == [(peer(0), OpenStore(TERM, 2, "127.0.0.1"))]
    assert not one.accepts(peer(0), StepDone(TERM, 1, 0, 0, EMPTY, EMPTY))
    assert one.receive(peer(0), StoreReady(TERM, 1, 0, "127.0.0.1", 4242), 5.0) == []
    assert one.refusals.stale == 2
    one.receive(peer(0), StoreReady(TERM, 2, 0, "127.0.0.1", 4243), 5.0)
    one.receive(peer(0), ready(0, epoch=2), 6.0)
    assert one.receive(peer(1), ready(1, epoch=2), 6.0) == [EpochReady(0, 2, (9, 10))]
