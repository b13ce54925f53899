from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.protocol.errors import DrumlineError, InvalidConfig, ProtocolError
from drumline.protocol.stateless import StatelessGroup, StoreError, connect_store, group_prefix, open_store

from .test_sockets import listening_addresses


@pytest.fixture
def opened() -> Iterator[tuple[TCPStore, str, int]]:
    store, host, port = open_store("127.0.0.1")
    yield store, host, port
    del store


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned or raised on each of ``count`` threads, by rank."""
    results: list[Any] = [None] * count

    def body(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except DrumlineError as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


# ------------------------------------------------------------------------------------------------------- the store


def test_the_store_listens_on_the_given_address_alone(opened: tuple[TCPStore, str, int]) -> None:
    _, host, port = opened
    assert host == "127.0.0.1"
    assert listening_addresses(port) == {"0100007F"}


def test_the_port_may_be_given(opened: tuple[TCPStore, str, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match="in use"):
            open_store("127.0.0.1", port)
    store, _, found = open_store("127.0.0.1", port)
    assert found == port
    del store


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost", "", "*", "203.0.113.9"])
def test_a_store_is_not_opened_on_a_wildcard_or_elsewhere(host: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        open_store(host)
    assert caught.value.field == "host"


def test_a_store_answers_those_who_connect(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened
    store.set("key", "value")
    assert connect_store(host, port).get("key") == b"value"


def test_connecting_to_nobody_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        connect_store("127.0.0.1", port, timeout_s=0.2)
    assert time.monotonic() - began < 2
    assert caught.value.retryable


def test_connecting_to_something_silent_ends_at_the_deadline() -> None:
    # torch's own client would wait for ever.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(StoreError, match="no answer within"):
            connect_store("127.0.0.1", silent.getsockname()[1], timeout_s=0.2)
        assert time.monotonic() - began < 3
    left = [t for t in threading.enumerate() if t.name.startswith("drumline: connecting")]
    for thread in left:
        thread.join(10)
        assert not thread.is_alive()


def test_connecting_can_be_abandoned() -> None:
    abandoned = threading.Event()
    abandoned.set()
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(StoreError, match="abandoned"):
        connect_store("127.0.0.1", port, timeout_s=60, abandoned=abandoned)
    assert time.monotonic() - began < 5


def test_a_store_that_is_late_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    opened: list[Any] = []
    late = threading.Timer(0.2, lambda: opened.append(open_store("127.0.0.1", port)))
    late.start()
    assert connect_store("127.0.0.1", port, timeout_s=20).num_keys() >= 0
    late.join(10)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(InvalidConfig, match="1 to 65535"):
        connect_store("127.0.0.1", port)


# -------------------------------------------------------------------------------------------------------- the group


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


def test_keys_do_not_pile_up(opened: tuple[TCPStore, str, int]) -> None:
    store, host, port = opened

    def work(rank: int) -> None:
        own = store if rank == 0 else connect_store(host, port)
        group = StatelessGroup(own, 1, 1, "dp", rank, range(2))
        for number in range(20):
            group.broadcast_obj(number, number % 2, 10)
            group.all_gather_obj(number, 10)
        group.barrier(10)

    before = store.num_keys()
    in_threads(2, work)
    assert store.num_keys() - before <= 2


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


def _member(rank: int, world: int, host: str, port: int, results: Connection) -> None:
    group = StatelessGroup(connect_store(host, port, 30), 1, 1, "all", rank, range(world))
    gathered = group.all_gather_obj(rank * rank, 30)
    results.send_bytes(msgspec.msgpack.encode([rank, gathered]))
    # The last exchange is over for this rank only when the others have read it too.
    group.barrier(30)


def test_processes_form_a_group(opened: tuple[TCPStore, str, int]) -> None:
    _, host, port = opened
    spawn = multiprocessing.get_context("spawn")
    reading, writing = spawn.Pipe(duplex=False)
    ranks = [spawn.Process(target=_member, args=(r, 2, host, port, writing), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        answers = []
        for _ in ranks:
            assert reading.poll(60)
            answers.append(msgspec.msgpack.decode(reading.recv_bytes()))
        assert sorted(answers) == [[0, [0, 1]], [1, [0, 1]]]
        for process in ranks:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join(10)
        reading.close()
        writing.close()


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
