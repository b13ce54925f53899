"""A group keeps its timeouts within 10 %, whatever its peers and its store do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from drumline.protocol.stateless import StatelessGroup, StoreError, connect_store

from .stage import Player, Stage, stage

__all__ = ["stage"]

ATTEMPTS = 3


@pytest.fixture
def store(stage: Stage) -> Iterator[Player]:
    """A store in a process of its own; threads that hang on it end with it."""
    player = stage.start("store")
    player.hear("port")
    yield player
    player.signal(signal.SIGKILL, "")
    for thread in threading.enumerate():
        if thread.name.startswith("drumline: "):
            thread.join(10)
            assert not thread.is_alive()


def member(store: Player, rank: int = 0) -> StatelessGroup:
    """One of three ranks; rank 2 never comes."""
    return StatelessGroup(connect_store("127.0.0.1", store.hear("port")), 1, 1, "ep", rank, (0, 1, 2))


def failure(operation: Callable[[], object]) -> tuple[float, str]:
    """The seconds that the operation takes to fail, and with which text."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        operation()
    return time.monotonic() - began, str(caught.value)


def assert_kept(timeout_s: float, operation: Callable[[], object], text: str) -> None:
    """It fails within 10 % of its timeout, never sooner; a busy machine may be late twice, not three times."""
    for attempt in range(1, ATTEMPTS + 1):
        seconds, found = failure(operation)
        assert text in found
        assert 0.9 * timeout_s <= seconds < timeout_s + 2
        if seconds <= 1.1 * timeout_s:
            return
        assert attempt < ATTEMPTS, f"{seconds:.3f} s for a timeout of {timeout_s} s"


@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
def test_peers_that_never_come(store: Player, timeout_s: float) -> None:
    group = member(store)
    assert_kept(timeout_s, lambda: group.barrier(timeout_s), f"nothing from rank 1, 2 within {timeout_s:g} s")


@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
def test_a_store_that_is_stopped(store: Player, timeout_s: float) -> None:
    group = member(store)
    store.signal(signal.SIGSTOP, "T")
    assert_kept(timeout_s, lambda: group.barrier(timeout_s), "the store does not answer")


def test_what_was_seen_before_the_store_stopped_is_known(store: Player) -> None:
    first, second = member(store), member(store, rank=1)
    coming = threading.Thread(target=failure, args=(lambda: second.barrier(1.5),))
    stopping = threading.Timer(0.8, store.signal, (signal.SIGSTOP, "T"))
    coming.start()
    stopping.start()
    seconds, text = failure(lambda: first.barrier(2.0))
    assert "barrier 1 of 1.1/ep: nothing from rank 2 within 2 s; the store does not answer" in text
    assert seconds < 4
    stopping.join(10)
    coming.join(10)


@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
def test_a_store_that_is_dead(store: Player, timeout_s: float) -> None:
    group = member(store)
    store.signal(signal.SIGKILL, "")
    seconds, text = failure(lambda: group.barrier(timeout_s))
    assert "barrier 1 of 1.1/ep" in text
    assert seconds <= 1.1 * timeout_s


def test_every_operation_keeps_its_timeout(store: Player) -> None:
    group = member(store)
    text = "nothing from rank 1 within 0.5 s"
    assert_kept(0.5, lambda: group.recv_obj(1, timeout_s=0.5), text)
    assert_kept(0.5, lambda: group.broadcast_obj(None, 1, 0.5), text)
    assert_kept(0.5, lambda: group.all_gather_obj(None, 0.5), "nothing from rank 1, 2 within 0.5 s")
    for _ in range(64):
        group.send_obj(b"", 2)
        group.broadcast_obj(b"", 0)
    assert_kept(0.5, lambda: group.send_obj(b"", 2, 0.5), "64 objects unread by rank 2 within 0.5 s")
    assert_kept(0.5, lambda: group.broadcast_obj(b"", 0, 0.5), "64 broadcasts unread by rank 1, 2 within 0.5 s")


def test_a_store_that_comes_back_has_lost_nothing(store: Player) -> None:
    first, second = member(store), member(store, rank=1)
    for number in range(3):
        first.send_obj(number, 1)
    assert second.recv_obj(0, timeout_s=20) == 0
    store.signal(signal.SIGSTOP, "T")
    failure(lambda: second.recv_obj(0, timeout_s=0.2))
    store.signal(signal.SIGCONT, "S")
    assert [second.recv_obj(0, timeout_s=20) for _ in range(2)] == [1, 2]


def test_a_timeout_of_nothing_ends_at_once(store: Player) -> None:
    seconds, text = failure(lambda: member(store).barrier(0.0))
    assert "rank 1, 2 within 0 s" in text
    assert seconds < 1
