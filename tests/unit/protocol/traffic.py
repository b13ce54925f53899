"""Random operations of one stateless group, the same on every member; what arrives is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from drumline.protocol.stateless import StatelessGroup

KINDS = ("barrier", "gather", "broadcast", "broadcast", "send", "send", "send")
TIMEOUT_S = 60.0


def traffic(
    group: StatelessGroup, operations: int, seed: int, kinds: Sequence[str] = KINDS, look: Callable[[], object] = int
) -> int:
    """Play this member's part until about ``operations`` calls were made by all members together, ended by a barrier.

    Every member chooses the same by ``seed``. ``look`` is called after each call. Returns the calls of this member.
    """
    chance = random.Random(seed)
    members, calls, total, number = group.members, 0, 0, 0
    while total < operations:
        number += 1
        kind, (src, dst) = chance.choice(list(kinds)), chance.sample(members, 2)
        burst = chance.randrange(1, 20) if kind == "send" else 1
        total += 2 * burst if kind == "send" else len(members)
        calls += play(group, kind, src, dst, burst, number)
        look()
    group.barrier(TIMEOUT_S)
    return calls + 1


def play(group: StatelessGroup, kind: str, src: int, dst: int, burst: int, number: int) -> int:
    """One turn; returns how many calls it took this member."""
    if kind == "barrier":
        group.barrier(TIMEOUT_S)
    elif kind == "gather":
        found = group.all_gather_obj([number, group.rank], TIMEOUT_S)
        assert found == [[number, member] for member in group.members]
    elif kind == "broadcast":
        assert group.broadcast_obj(number if group.rank == src else None, src, TIMEOUT_S) == number
    elif group.rank == src:
        for turn in range(burst):
            group.send_obj([number, src, turn], dst, TIMEOUT_S)
        return burst
    elif group.rank == dst:
        for turn in range(burst):
            assert group.recv_obj(src, timeout_s=TIMEOUT_S) == [number, src, turn]
        return burst
    else:
        return 0
    return 1
