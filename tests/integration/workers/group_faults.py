"""What the ranks of :mod:`tests.integration.workers.ranks` do while one of their group dies, stops or is late."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from drumline.protocol.errors import DrumlineError
from drumline.workers.groups import GroupCoordinator

if TYPE_CHECKING:
    from tests.integration.workers.ranks import Rank


def _one_row_each(group: GroupCoordinator) -> None:
    rows, splits = torch.ones(group.world_size, 2), [1] * group.world_size
    group.all_to_all(torch.empty_like(rows), rows, splits, splits)


OPERATIONS: dict[str, Callable[[GroupCoordinator], Any]] = {
    "all_reduce": lambda group: group.all_reduce(torch.ones(64)),
    "all_gather": lambda group: group.all_gather(torch.ones(64)),
    "reduce_scatter": lambda group: group.reduce_scatter(torch.ones(64 * group.world_size)),
    "all_to_all": lambda group: _one_row_each(group),
    "broadcast": lambda group: group.broadcast(torch.ones(64), group.last_rank),
    "barrier": lambda group: group.barrier(10.0),
    "recv": lambda group: group.recv((4,), torch.float32, group.last_rank),
}


def _outcome(call: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        call()
    except DrumlineError as error:
        return {"kind": error.kind, "text": error.text, "ms": 1e3 * (time.monotonic() - start)}
    return {"kind": "none", "text": "", "ms": 1e3 * (time.monotonic() - start)}


def _groups(rank: Rank, **changes: Any) -> dict[str, GroupCoordinator]:
    """A group for each operation, since one is of no use after its first error."""
    members = tuple(range(rank.world))
    groups = {name: rank.form_among(name, members, connect=True, **changes) for name in OPERATIONS}
    for name, group in groups.items():
        if name != "recv":
            OPERATIONS[name](group)
    return groups


def killed_in_the_middle(rank: Rank) -> dict[str, Any]:
    """The last rank is killed while all others are inside an operation, in one group after the other."""
    groups = _groups(rank)
    if rank.rank == rank.world - 1:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    outcomes = {}
    for name, group in groups.items():
        outcomes[name] = _outcome(lambda name=name, group=group: OPERATIONS[name](group))  # type: ignore[misc]
        group.close()
    return outcomes


def abort_while_stopped(rank: Rank) -> dict[str, Any]:
    """The last rank stops itself; the epoch of one operation after the other is ended while the others are in it."""
    groups = {}
    for epoch, name in enumerate(OPERATIONS, 1):
        groups[name] = rank.form_among(name, tuple(range(rank.world)), epoch, connect=True)
        groups[name].all_reduce(torch.ones(3))
    if rank.rank == rank.world - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    outcomes = {}
    for epoch, (name, group) in enumerate(groups.items(), 1):
        told = [0.0]

        def tell(epoch: int = epoch, told: list[float] = told) -> None:
            told[0] = time.monotonic()
            rank.abort.abort_before(1, epoch + 1, "the test says so")

        threading.Timer(0.1, tell).start()
        outcome = _outcome(lambda name=name, group=group: OPERATIONS[name](group))  # type: ignore[misc]
        left = time.monotonic()
        group.close()
        closed = time.monotonic()
        outcomes[name] = outcome | {"left_ms": 1e3 * (left - told[0]), "close_ms": 1e3 * (closed - left)}
    outcomes["threads"] = {"left": _threads_left(2.0)}
    return outcomes


def _threads_left(timeout_s: float) -> list[str]:
    """The threads of groups that do not end in time."""
    end = time.monotonic() + timeout_s
    while True:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith(("drop-", "send-", "recv-"))]
        if not names or time.monotonic() > end:
            return names
        time.sleep(0.01)


def a_peer_comes_late(rank: Rank) -> dict[str, Any]:
    """Later than a slice of a wait, and than what a wait spins for."""
    group = rank.form_among("late", tuple(range(rank.world)), connect=True)
    late = rank.world - 1
    for _ in range(2):
        if rank.rank == late:
            time.sleep(0.12)
        assert group.all_reduce(torch.ones(2)).tolist() == [rank.world] * 2
        if rank.rank == late:
            time.sleep(0.12)
            group.send(torch.ones(3), 0)
        elif rank.rank == 0:
            assert group.recv((3,), torch.float32, late).tolist() == [1.0] * 3
        if rank.rank == late:
            time.sleep(0.12)
        group.barrier(5.0)
    return {"failed": False}


def a_peer_never_comes(rank: Rank) -> dict[str, Any]:
    groups = {
        name: rank.form_among(name, tuple(range(rank.world)), connect=True, collective_deadline_s=0.3)
        for name in ("all_reduce", "barrier", "recv")
    }
    groups["not connected"] = rank.form_among("not connected", tuple(range(rank.world)))
    if rank.rank == rank.world - 1:
        time.sleep(2.5)
        return {}
    outcomes = {
        "all_reduce": _outcome(lambda: groups["all_reduce"].all_reduce(torch.ones(2))),
        "barrier": _outcome(lambda: groups["barrier"].barrier(0.2)),
        "recv": _outcome(lambda: groups["recv"].recv((2,), torch.float32, rank.world - 1)),
        "not connected": _outcome(lambda: groups["not connected"].barrier(0.2)),
    }
    time.sleep(0.3)  # none may close, which the others would take for a loss, before all have seen the deadline
    return outcomes


def sends_are_bounded(rank: Rank) -> dict[str, Any]:
    """The 65th unfinished send waits for the oldest."""
    group = rank.form_among("bounded", (0, 1), connect=True)
    if rank.rank == 1:
        time.sleep(0.4)
        found = [int(group.recv((1 << 16,), torch.float32, 0)[0]) for _ in range(70)]
        assert found == list(range(70))
        return {}
    start = time.monotonic()
    sends = [group.isend(torch.full((1 << 16,), float(number)), 1) for number in range(64)]
    before = time.monotonic() - start
    sends += [group.isend(torch.full((1 << 16,), float(number)), 1) for number in range(64, 70)]
    after = time.monotonic() - start
    for send in sends:
        send.wait()
    return {"before_ms": 1e3 * before, "after_ms": 1e3 * after}


def close_lets_messages_out(rank: Rank) -> dict[str, Any]:
    """A send that nobody has received yet when its group is closed arrives all the same."""
    group = rank.form_among("going", (0, 1), connect=True)
    if rank.rank == 0:
        group.isend(torch.arange(1 << 18), 1)
        group.close()
        return {"left": _threads_left(3.0)}
    time.sleep(0.2)
    assert torch.equal(group.recv((1 << 18,), torch.int64, 0), torch.arange(1 << 18))
    group.close()
    return {"left": _threads_left(3.0)}


def close_ends_what_is_expected(rank: Rank) -> dict[str, Any]:
    """Both ranks have posted receives that nothing will come for."""
    group = rank.form_among("idle", (0, 1), connect=True)
    group.irecv((3,), torch.float32, 1 - rank.rank)
    group.barrier(5.0)
    group.close()
    left = _threads_left(2.0)
    return {"left": left, "after": _outcome(lambda: group.all_reduce(torch.ones(1)))["kind"]}


def abort_is_seen_by_all(rank: Rank) -> dict[str, Any]:
    """One rank gives its group up; all who wait for it know at once."""
    group = rank.form_among("given up", tuple(range(rank.world)), connect=True)
    group.all_reduce(torch.ones(1))
    if rank.rank == 0:
        time.sleep(0.1)
        group.abort()
        time.sleep(0.5)
        return {"kind": "peer_lost", "ms": 0.0}
    return _outcome(lambda: group.all_reduce(torch.ones(1)))
