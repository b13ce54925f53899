"""Groups under load for long: ``python -m tests.unit.protocol.soak_stateless --operations 100000 --minutes 1``.

Four members, as threads with a connection each, make that many calls of all kinds, then as many broadcasts and nothing
else; again with another seed until the minutes are over. It fails when the store ever holds more than may be unread, or
when anything but the last barrier's keys and the marks of readers is left in the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from drumline.protocol.outbox import MAX_UNREAD
from drumline.protocol.stateless import StatelessGroup, connect_store, open_store

from .stores import in_threads
from .traffic import KINDS, traffic

MEMBERS = 4
# Of each member: what it broadcast and what it sent to three, unread; its marks and its last barrier.
BOUND = MEMBERS * (MEMBERS * MAX_UNREAD + MEMBERS)
LEFT = MEMBERS * MEMBERS
# A round that makes fewer calls a second is taken to hang.
SLOWEST_PER_S = 100


def round_of(operations: int, seed: int, kinds: tuple[str, ...]) -> dict[str, object]:
    """One store's life. Raises AssertionError when it grows."""
    store, host, port = open_store("127.0.0.1")
    before = store.num_keys()
    peak = [0]

    def look() -> None:
        peak[0] = max(peak[0], store.num_keys() - before)

    def work(rank: int) -> int:
        group = StatelessGroup(connect_store(host, port), 1, 1, "soak", rank, range(MEMBERS))
        return traffic(group, operations, seed, kinds, look if rank == 0 else int)

    began = time.monotonic()
    calls = sum(in_threads(MEMBERS, work, 60 + operations / SLOWEST_PER_S))
    seconds = time.monotonic() - began
    left = store.num_keys() - before
    found = {"seed": seed, "kinds": sorted(set(kinds)), "calls": calls, "calls_per_s": round(calls / seconds)}
    found |= {"most_keys": peak[0], "keys_left": left}
    print(json.dumps(found), flush=True)
    assert calls >= operations
    assert peak[0] <= BOUND, f"{peak[0]} keys; at most {BOUND} can be unread"
    assert left <= LEFT, f"{left} keys left; {LEFT} may be"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 40))
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    seed = arguments.seed
    while True:
        round_of(arguments.operations, seed, KINDS)
        round_of(arguments.operations, seed, ("broadcast",))
        seed += 1
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    sys.exit(main())
