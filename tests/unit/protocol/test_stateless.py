"""Collectives of a group whose members are threads of one process."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import pytest
from torch import distributed
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]

from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.stateless import (
    StatelessGroup,
    StoreError,
    connect_store,
    group_prefix,
    open_store,
    reserve_port,
)

from .stores import in_threads, opened

__all__ = ["opened"]


class Greeting(msgspec.Struct):
    rank: int
    text: str


def test_members_exchange_objects_in_member_order(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened

    def work(rank: int) -> Any:
        own = store if rank == 0 else connect_store(host, port)
        group = StatelessGroup(own, 1, 2, "ep", rank, (2, 0, 1))
        group.barrier(10)
        gathered = group.all_gather_obj({"rank": rank}, 10)
        typed = group.all_gather_obj(Greeting(rank, "hello"), 10, as_type=Greeting)
        told = group.broadcast_obj([1, 2] if rank == 1 else None, 1, 10)
        group.barrier(10)
        return gathered, typed, told

    expected = (
        [{"rank": 2}, {"rank": 0}, {"rank": 1}],
        [Greeting(2, "hello"), Greeting(0, "hello"), Greeting(1, "hello")],
        [1, 2],
    )
    assert in_threads(3, work) == [expected] * 3


def test_a_barrier_names_who_is_missing(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened

    def work(rank: int) -> None:
        own = store if rank == 0 else connect_store(host, port)
        group = StatelessGroup(own, 3, 4, "ep", rank * 10, (0, 10, 20, 30))
        group.barrier(0.3)

    errors = in_threads(2, work)
    for error in errors:
        assert isinstance(error, StoreError)
        assert "barrier 1 of 3.4/ep: nothing from rank 20, 30 within 0.3 s" in str(error)


def test_epochs_do_not_answer_each_other(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened

    def work(rank: int) -> None:
        own = store if rank == 0 else connect_store(host, port)
        StatelessGroup(own, 1, 1 + rank, "ep", rank, (0, 1)).barrier(0.3)

    assert all(isinstance(error, StoreError) for error in in_threads(2, work))


def test_a_wait_can_be_abandoned(opened: tuple[TCPStore, str, int]) -> None:
    store, _, _ = opened
    abandoned = threading.Event()
    timer = threading.Timer(0.1, abandoned.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(StoreError, match="abandoned"):
        StatelessGroup(store, 1, 1, "ep", 0, (0, 1), abandoned).barrier(60)
    assert time.monotonic() - began < 5
    timer.join(5)


def test_objects_of_the_wrong_type_are_refused(opened: tuple[TCPStore, str, int]) -> None:
    store, _, _ = opened
    alone = StatelessGroup(store, 1, 1, "ep", 0, (0,))
    with pytest.raises(ProtocolError, match="does not decode"):
        alone.all_gather_obj({"rank": "x"}, 5, as_type=Greeting)
    with pytest.raises(ProtocolError, match="the limit is"):
        alone.broadcast_obj(bytes(9 << 20), 0, 5)


def test_groups_that_make_no_sense_are_refused(opened: tuple[TCPStore, str, int]) -> None:
    store, _, _ = opened
    for rank, members in ((3, (0, 1)), (0, (0, 0)), (0, ())):
        with pytest.raises(ProtocolError, match="make no group"):
            StatelessGroup(store, 1, 1, "ep", rank, members)
    with pytest.raises(ProtocolError, match="not a member"):
        StatelessGroup(store, 1, 1, "ep", 0, (0, 1)).broadcast_obj(1, 7, 5)


def test_keys_say_epoch_group_kind_number_and_ends(opened: tuple[TCPStore, str, int]) -> None:
    group = StatelessGroup(opened[0], 1, 2, "ep", 0, (0, 3))
    assert group_prefix(1, 2, "ep") == "1.2/ep"
    assert group.key("gather", 7, 3) == "1.2/ep/gather/7/3/all"
    assert group.key("send", 7, 3, 0) == "1.2/ep/send/7/3/0"


def test_the_death_of_the_store_is_an_error_and_no_hang() -> None:
    store, host, port = open_store("127.0.0.1")
    client = connect_store(host, port)
    group = StatelessGroup(client, 1, 1, "ep", 1, (0, 1))
    dropped = threading.Timer(0.1, lambda: held.clear())
    held = [store]
    del store
    dropped.start()
    began = time.monotonic()
    with pytest.raises(StoreError, match="barrier 1"):
        group.barrier(20)
    assert time.monotonic() - began < 10
    dropped.join(5)


def create(rank: int, size: int, port: int, listener: Any, **options: Any) -> StatelessGroup:
    return StatelessGroup.create("127.0.0.1", port, rank, size, listener=None if rank else listener, **options)


def test_a_group_is_created_used_and_closed() -> None:
    listener, port = reserve_port("127.0.0.1")

    def work(rank: int) -> Any:
        group = create(rank, 3, port, listener, store_timeout=20)
        gathered = group.all_gather_obj(rank)
        group.barrier()
        group.close()
        group.close()
        with pytest.raises(ProtocolError, match="closed"):
            group.barrier(1)
        return gathered

    assert in_threads(3, work) == [[0, 1, 2]] * 3
    with pytest.raises(StoreError, match="cannot be reached"):
        connect_store("127.0.0.1", port, 0.1)


def test_closing_names_who_did_not_leave() -> None:
    listener, port = reserve_port("127.0.0.1")
    left = threading.Event()

    def work(rank: int) -> None:
        group = create(rank, 3, port, listener, store_timeout=20)
        if rank == 2:
            assert left.wait(20)
            return
        try:
            group.close(0.3)
        finally:
            if rank == 0:
                left.set()

    errors = in_threads(3, work)
    assert "close of 0.0/world: nothing from rank 2 within 0.3 s" in str(errors[0])
    assert errors[1:] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"world_size": 0}, "world_size"),
        ({"rank": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"host": "0.0.0.0"}, "host"),
        ({"data_expiration_seconds": 0}, "data_expiration_seconds"),
        ({"store_timeout": -1}, "store_timeout"),
    ],
)
def test_what_makes_no_group_is_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    listener, port = reserve_port("127.0.0.1")
    listener.close()
    with pytest.raises(InvalidConfig) as caught:
        StatelessGroup.create(**{"host": "127.0.0.1", "port": port, "rank": 0, "world_size": 2, **arguments})
    assert caught.value.field == field


def test_a_listener_belongs_to_rank_0() -> None:
    listener, port = reserve_port("127.0.0.1")
    with listener, pytest.raises(InvalidConfig) as caught:
        StatelessGroup.create("127.0.0.1", port, 1, 2, listener=listener)
    assert caught.value.field == "listener"


def test_a_failed_collective_does_not_shift_the_next(opened: tuple[TCPStore, str, int]) -> None:
    _, host, port = opened

    def work(rank: int) -> Any:
        group = StatelessGroup(connect_store(host, port), 1, 1, "ep", rank, (0, 1))
        # Rank 0 cannot send what it is asked to; rank 1 waits in vain.
        with pytest.raises(ProtocolError if rank == 0 else StoreError):
            group.broadcast_obj(object(), 0, 0.3)
        with pytest.raises(ProtocolError if rank == 0 else StoreError):
            group.all_gather_obj(object() if rank == 0 else 1, 0.3)
        return group.all_gather_obj(rank, 20)

    assert in_threads(2, work) == [[0, 1]] * 2


def test_no_default_process_group_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the default process group was asked for")

    monkeypatch.setattr(distributed, "init_process_group", refuse)
    monkeypatch.setattr(distributed_c10d, "init_process_group", refuse)
    monkeypatch.setattr(distributed_c10d, "_get_default_group", refuse)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", refuse)
    monkeypatch.setattr(type(distributed_c10d._world), "default_pg", property(refuse, refuse))
    with pytest.raises(AssertionError, match="was asked for"):
        distributed.is_initialized()
    listener, port = reserve_port("127.0.0.1")

    def work(rank: int) -> Any:
        group = create(rank, 2, port, listener, store_timeout=20)
        group.send_obj("hello", 1 - rank)
        results = [group.all_gather_obj(rank), group.broadcast_obj(rank, 1), group.recv_obj(1 - rank)]
        group.barrier()
        group.expire_data()
        group.close()
        return results

    assert in_threads(2, work) == [[[0, 1], 1, "hello"]] * 2
