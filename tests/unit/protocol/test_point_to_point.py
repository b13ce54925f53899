"""Objects from one member to another."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.protocol.errors import ProtocolError
from drumline.protocol.outbox import MAX_UNREAD
from drumline.protocol.stateless import StatelessGroup, StoreError, connect_store

from .stores import in_threads, opened

__all__ = ["opened"]


class Offer(msgspec.Struct):
    rank: int
    text: str


@pytest.fixture
def pair(opened: tuple[TCPStore, str, int]) -> tuple[StatelessGroup, StatelessGroup]:
    store, host, port = opened
    return tuple(  # type: ignore[return-value]
        StatelessGroup(store if rank == 0 else connect_store(host, port), 1, 1, "pp", rank, (0, 1)) for rank in range(2)
    )


def test_senders_to_one_receiver_do_not_collide(opened: tuple[TCPStore, str, int]) -> None:
    _, host, port = opened

    def work(rank: int) -> Any:
        group = StatelessGroup(connect_store(host, port), 1, 1, "ep", rank, range(4))
        if rank:
            for number in range(30):
                group.send_obj([rank, number], 0, 20)
            return group.recv_obj(0, timeout_s=20)
        received = [[group.recv_obj(src, timeout_s=20) for src in (3, 1, 2)] for _ in range(30)]
        for dst in (1, 2, 3):
            group.send_obj(f"thanks {dst}", dst, 20)
        return received

    expected = [[[src, number] for src in (3, 1, 2)] for number in range(30)]
    assert in_threads(4, work) == [expected, "thanks 1", "thanks 2", "thanks 3"]


def test_objects_arrive_typed_and_in_order(pair: tuple[StatelessGroup, StatelessGroup]) -> None:
    first, second = pair
    first.send_obj(Offer(0, "one"), 1)
    first.send_obj({"any": [1, None, b"thing"]}, 1)
    assert second.recv_obj(0, Offer, 20) == Offer(0, "one")
    assert second.recv_obj(0, timeout_s=20) == {"any": [1, None, b"thing"]}


def test_a_receive_that_came_too_early_can_be_tried_again(pair: tuple[StatelessGroup, StatelessGroup]) -> None:
    first, second = pair
    with pytest.raises(StoreError, match=r"receive 1 from rank 0 of 1\.1/pp: nothing from rank 0 within 0\.1 s"):
        second.recv_obj(0, timeout_s=0.1)
    first.send_obj("late", 1)
    assert second.recv_obj(0, timeout_s=20) == "late"


def test_what_does_not_decode_is_gone(pair: tuple[StatelessGroup, StatelessGroup]) -> None:
    first, second = pair
    first.send_obj("no offer", 1)
    first.send_obj(Offer(0, "an offer"), 1)
    with pytest.raises(ProtocolError, match="does not decode"):
        second.recv_obj(0, Offer, 20)
    assert second.recv_obj(0, Offer, 20) == Offer(0, "an offer")


def test_what_cannot_be_sent_is_refused_and_takes_no_number(pair: tuple[StatelessGroup, StatelessGroup]) -> None:
    first, second = pair
    for value, reason in ((object(), "does not carry"), (1 << 70, "does not carry"), (bytes(9 << 20), "the limit is")):
        with pytest.raises(ProtocolError, match=reason):
            first.send_obj(value, 1)
    for operation in (lambda: first.send_obj(1, 7), lambda: first.recv_obj(7)):
        with pytest.raises(ProtocolError, match="rank 7 is not a member"):
            operation()
    first.send_obj("sound", 1)
    assert second.recv_obj(0, timeout_s=20) == "sound"


def test_the_receiver_deletes_what_it_has_read(
    opened: tuple[TCPStore, str, int], pair: tuple[StatelessGroup, StatelessGroup]
) -> None:
    first, second = pair
    first.send_obj("once", 1)
    assert second.recv_obj(0, timeout_s=20) == "once"
    assert opened[0].num_keys() == 0


def test_a_sender_runs_ahead_by_a_bound_and_goes_on_when_it_is_read(
    opened: tuple[TCPStore, str, int], pair: tuple[StatelessGroup, StatelessGroup]
) -> None:
    first, second = pair
    for number in range(MAX_UNREAD):
        first.send_obj(number, 1)
    with pytest.raises(StoreError, match=f"{MAX_UNREAD} objects unread by rank 1 within 0.1 s"):
        first.send_obj("too much", 1, 0.1)
    assert opened[0].num_keys() == MAX_UNREAD
    reading = threading.Timer(0.1, lambda: [second.recv_obj(0, timeout_s=20) for _ in range(3)])
    reading.start()
    first.send_obj("after a wait", 1, 20)
    reading.join(20)
    assert [second.recv_obj(0, timeout_s=20) for _ in range(MAX_UNREAD - 2)] == [
        *range(3, MAX_UNREAD),
        "after a wait",
    ]


def test_a_wait_for_an_object_can_be_abandoned(opened: tuple[TCPStore, str, int]) -> None:
    abandoned = threading.Event()
    timer = threading.Timer(0.1, abandoned.set)
    timer.start()
    with pytest.raises(StoreError, match=r"receive 1 from rank 1 of 1\.1/pp: abandoned"):
        StatelessGroup(opened[0], 1, 1, "pp", 0, (0, 1), abandoned).recv_obj(1, timeout_s=60)
    timer.join(5)
