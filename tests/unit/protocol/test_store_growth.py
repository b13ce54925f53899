"""However long a group lives, the store holds what is unread and a few keys per pair."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.protocol.outbox import MAX_UNREAD
from drumline.protocol.stateless import StatelessGroup, StoreError, connect_store

from .stores import in_threads, opened
from .traffic import KINDS, traffic

__all__ = ["opened"]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def keys_of_traffic(where: tuple[TCPStore, str, int], size: int, operations: int, kinds: Sequence[str]) -> list[int]:
    """How many keys the store held after each turn of rank 0, and in the end."""
    store, host, port = where
    seen: list[int] = []

    def work(rank: int) -> int:
        group = StatelessGroup(connect_store(host, port), 1, 1, "ep", rank, range(size))
        return traffic(group, operations, 7, kinds, (lambda: seen.append(store.num_keys())) if rank == 0 else int)

    assert sum(in_threads(size, work, 100)) >= operations
    return [*seen, store.num_keys()]


def test_thousands_of_mixed_operations_leave_nothing_behind(opened: tuple[TCPStore, str, int]) -> None:
    seen = keys_of_traffic(opened, 3, 3000, KINDS)
    # The last barrier of each member, and one mark per pair of a reader and a source of broadcasts.
    assert seen[-1] <= 3 * 3
    assert max(seen) <= 3 * MAX_UNREAD


@pytest.mark.parametrize("kind", ["broadcast", "send"])
def test_one_kind_alone_does_not_grow_the_store(opened: tuple[TCPStore, str, int], kind: str) -> None:
    store, host, port = opened
    seen: list[int] = []

    def work(rank: int) -> None:
        group = StatelessGroup(connect_store(host, port), 1, 1, "ep", rank, range(2))
        for number in range(500):
            if kind == "broadcast":
                assert group.broadcast_obj(number, 0, 30) == number
            elif rank == 0:
                group.send_obj(number, 1, 30)
            else:
                assert group.recv_obj(0, int, 30) == number
            seen.append(store.num_keys())

    in_threads(2, work)
    # One mark of the reader besides what it has not read.
    assert max(seen) <= MAX_UNREAD + 1


def test_barriers_to_which_nobody_comes_do_not_grow_the_store(opened: tuple[TCPStore, str, int]) -> None:
    group = StatelessGroup(opened[0], 1, 1, "ep", 0, (0, 1))
    for _ in range(2 * MAX_UNREAD):
        with pytest.raises(StoreError, match="rank 1"):
            group.barrier(0.01)
    for thread in threading.enumerate():
        if thread.name.startswith("drumline: barrier"):
            thread.join(10)
    # Deletes what the last ones had no time for.
    group.expire_data()
    assert opened[0].num_keys() == MAX_UNREAD


def test_what_nobody_fetched_expires(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened
    clock = Clock()
    first = StatelessGroup(store, 1, 1, "ep", 0, (0, 1), data_expiration_seconds=60, clock=clock)
    second = StatelessGroup(connect_store(host, port), 1, 1, "ep", 1, (0, 1))
    for number in range(3):
        first.send_obj(number, 1)
    first.broadcast_obj("to all", 0)
    assert second.recv_obj(0, timeout_s=20) == 0
    clock.now += 59
    first.expire_data()
    assert second.recv_obj(0, timeout_s=20) == 1
    first.send_obj("young", 1)
    clock.now += 2
    assert store.check([first.key("send", 3, 0, 1), first.key("broadcast", 1, 0)])
    first.expire_data()
    assert not store.check([first.key("send", 3, 0, 1)])
    assert not store.check([first.key("broadcast", 1, 0)])
    with pytest.raises(StoreError, match=r"receive 3 from rank 0 .*: numbers 3 to 3 expired unread"):
        second.recv_obj(0, timeout_s=20)
    assert second.recv_obj(0, timeout_s=20) == "young"


def test_a_send_begins_with_the_expiry(opened: tuple[TCPStore, str, int]) -> None:
    clock = Clock()
    group = StatelessGroup(opened[0], 1, 1, "ep", 0, (0, 1, 2), data_expiration_seconds=60, clock=clock)
    for _ in range(MAX_UNREAD):
        group.send_obj("old", 1, 20)
    clock.now += 61
    group.send_obj("new", 2, 20)
    # The floor for rank 1 besides.
    assert sorted(opened[0].list_keys()) == [group.key("floor", 0, 0, 1), group.key("send", 1, 0, 2)]
    group.send_obj("goes on", 1, 20)


def test_what_was_read_leaves_no_trace_when_it_expires(opened: tuple[TCPStore, str, int]) -> None:
    clock = Clock()
    group = StatelessGroup(opened[0], 1, 1, "ep", 0, (0,), data_expiration_seconds=60, clock=clock)
    group.send_obj("to itself", 0)
    assert group.recv_obj(0) == "to itself"
    clock.now += 61
    group.expire_data()
    assert opened[0].num_keys() == 0
