"""What goes between the two threads of a worker, and what of it is left when an epoch or a coordinator is over."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from drumline.protocol.errors import EngineClosed
from drumline.protocol.messages import (
    NO_FETCHES,
    CancelStage,
    Configure,
    FromWorker,
    Leave,
    Load,
    Loaded,
    Shutdown,
    StageExperts,
    Step,
    StepDone,
)
from drumline.workers import outbox
from drumline.workers.abort import AbortFlag
from drumline.workers.inbox import INBOX_LIMIT, CoordinatorLost, Inbox
from drumline.workers.outbox import OUTBOX_LIMIT, Outbox

NONE = np.zeros(0, dtype=np.int32)
NO_EXPERTS = np.zeros((0, 0), dtype=np.int32)


def done(number: int, term: int = 1) -> StepDone:
    return StepDone(term, 1, 0, number, NONE, NONE)


def loaded(term: int) -> Loaded:
    return Loaded(term, 0, "digest", 64, 1, 1, 0.1, "cpu")


def configure(epoch: int) -> Configure:
    return Configure(1, epoch, "compute", (), "", 0, NO_EXPERTS)


def a_step(number: int, epoch: int = 1) -> Step:
    return Step(1, epoch, 0, number, NONE, NONE, (), NONE, NONE, NONE, NONE)


class Sink:
    """A socket that takes messages while it has room."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.sent: list[FromWorker] = []

    def __call__(self, message: FromWorker) -> bool:
        if len(self.sent) >= self.room:
            return False
        self.sent.append(message)
        return True


def await_entries(box: Outbox, count: int) -> None:
    """Until another thread has put so many."""
    deadline = time.monotonic() + 10.0
    while len(box) < count:
        assert time.monotonic() < deadline, f"{len(box)} of {count}"
        time.sleep(0.001)


def test_who_has_something_else_to_look_after_waits_for_an_order_no_longer_than_it_says() -> None:
    abort = AbortFlag()
    inbox = Inbox(abort)
    assert inbox.get(0.001) is None
    abort.abort_before(1, 2, "a newer one")
    for order in (StageExperts(1, 1, 1, 0, NONE, NO_FETCHES, NONE), CancelStage(1, 1, 1)):
        assert inbox.put(order)
    assert inbox.get(0.001) is None
    assert inbox.stale == 2
    assert inbox.put(a_step(0, 2))
    assert isinstance(inbox.get(0.001), Step)


def test_orders_of_an_epoch_that_was_overtaken_are_passed_by_and_counted() -> None:
    abort = AbortFlag()
    inbox = Inbox(abort)
    for order in (Leave(1, 2), configure(2), a_step(0, 2), Load(1, NO_EXPERTS), Leave(1, 3)):
        assert inbox.put(order)
    abort.abort_before(1, 3, "epoch 3 begins")
    assert isinstance(inbox.get(), Load)
    assert inbox.get() == Leave(1, 3)
    assert inbox.stale == 3


def test_the_inbox_is_bounded_but_for_the_end() -> None:
    inbox = Inbox(AbortFlag())
    assert all(inbox.put(a_step(number)) for number in range(INBOX_LIMIT))
    assert not inbox.put(a_step(INBOX_LIMIT))
    assert inbox.put(Shutdown(1))
    assert inbox.put(CoordinatorLost("gone"))
    assert len(inbox) == INBOX_LIMIT + 2


def test_orders_of_a_coordinator_that_is_gone_are_forgotten_and_loads_among_them_told() -> None:
    inbox = Inbox(AbortFlag())
    load = Load(1, NO_EXPERTS)
    for order in (load, Leave(1, 1), configure(1)):
        inbox.put(order)
    assert inbox.drop() == [load]
    assert len(inbox) == 0
    assert inbox.stale == 3


def test_replies_go_out_in_order_when_there_is_room() -> None:
    sink = Sink(room=1)
    box = Outbox(sink)
    for number in range(3):
        box.put(done(number))
    box.drain()
    assert (len(sink.sent), len(box), box.waits) == (1, 2, True)
    sink.room = 3
    box.drain()
    assert [reply.step for reply in sink.sent if isinstance(reply, StepDone)] == [0, 1, 2]
    assert (len(box), box.waits) == (0, False)


def test_nothing_of_an_older_term_is_told() -> None:
    sink = Sink()
    box = Outbox(sink)
    box.loads = {1, 2}
    box.term = 2
    box.put(loaded(1))
    box.put(loaded(2))
    box.drain()
    assert sink.sent == [loaded(2)]
    assert box.dropped == 1
    assert box.loads == set()


def test_what_is_dropped_counts_as_answered_and_frees_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FLUSH_S", 20.0)
    sink = Sink(room=0)
    box = Outbox(sink)
    box.loads = {1}
    box.put(loaded(1))
    box.drain()
    waits = threading.Thread(target=box.put_and_flush, args=(done(0),))
    waits.start()
    await_entries(box, 3)
    start = time.monotonic()
    box.drop()
    waits.join(10.0)
    assert time.monotonic() - start < 10.0
    assert (len(box), box.dropped, box.loads) == (0, 2, set())


def test_who_flushes_waits_until_it_is_sent_and_not_for_long() -> None:
    sink = Sink()
    box = Outbox(sink)
    start = time.monotonic()
    box.put_and_flush(done(0))
    assert 0.2 <= time.monotonic() - start < 5.0
    waits = threading.Thread(target=box.put_and_flush, args=(done(1),))
    waits.start()
    await_entries(box, 4)
    box.drain()
    waits.join(5.0)
    assert sink.sent == [done(0), done(1)]
    box.flush(done(2))
    assert sink.sent[-1] == done(2)


def test_a_full_outbox_is_an_error_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ROOM_DEADLINE_S", 0.05)
    box = Outbox(Sink(room=0))
    for number in range(OUTBOX_LIMIT):
        box.put(done(number))
    with pytest.raises(EngineClosed, match=f"{OUTBOX_LIMIT} replies wait"):
        box.put(done(OUTBOX_LIMIT))
