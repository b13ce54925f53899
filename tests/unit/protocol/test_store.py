"""Opening a store where it is told to be, and reaching it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.stateless import StoreError, connect_store, open_store, reserve_port

from .stores import opened
from .test_sockets import listening_addresses

__all__ = ["opened"]


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


def test_a_reserved_port_is_the_stores_own_from_the_start() -> None:
    listener, port = reserve_port("127.0.0.1")
    assert listening_addresses(port) == {"0100007F"}
    with pytest.raises(InvalidConfig, match="in use"):
        reserve_port("127.0.0.1", port)
    # Whoever was told the port may connect before the store is opened.
    early: list[TCPStore] = []
    connecting = threading.Thread(target=lambda: early.append(connect_store("127.0.0.1", port, 20)))
    connecting.start()
    time.sleep(0.1)
    store, host, found = open_store("127.0.0.1", port, listener=listener)
    connecting.join(20)
    store.set("key", "value")
    assert (host, found, early[0].get("key")) == ("127.0.0.1", port, b"value")
    assert listener.fileno() == -1
    assert listening_addresses(port) == {"0100007F"}


def test_reserved_ports_differ() -> None:
    reserved = [reserve_port("127.0.0.1") for _ in range(200)]
    try:
        assert len({port for _, port in reserved}) == 200
    finally:
        for listener, _ in reserved:
            listener.close()


def test_a_listener_elsewhere_is_refused() -> None:
    listener, port = reserve_port("127.0.0.1")
    with pytest.raises(InvalidConfig) as caught:
        open_store("127.0.0.2", port, listener=listener)
    assert caught.value.field == "listener"
    assert listener.fileno() == -1
