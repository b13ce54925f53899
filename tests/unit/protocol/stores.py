"""A store in the test's own process, and members of groups as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.protocol.errors import DrumlineError
from drumline.protocol.stateless import open_store


@pytest.fixture
def opened() -> Iterator[tuple[TCPStore, str, int]]:
    store, host, port = open_store("127.0.0.1")
    yield store, host, port
    del store


def in_threads(count: int, work: Callable[[int], Any], timeout_s: float = 30) -> list[Any]:
    """What ``work(rank)`` returned, or the error of ours that it raised, on each of ``count`` threads, by rank."""
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
        thread.join(timeout_s)
        assert not thread.is_alive()
    return results
