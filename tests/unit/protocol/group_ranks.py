"""Members of stateless groups in processes of their own: ``python -m tests.unit.protocol.group_ranks``.

Reads orders from stdin, one JSON object a line: ``{"id": 7, "play": "member", "arguments": {...}}``. Each is played in
a process that is forked for it, so that torch is imported once for all. What a process has to say comes out as lines
``{"id": 7, "said": KIND, "what": ...}``: its pid, what it tells on the way, and in the end "done" or "failed".
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from drumline.protocol.errors import DrumlineError
from drumline.protocol.stateless import StatelessGroup, connect_store, open_store, reserve_port

HOST = "127.0.0.1"
DEADLINE_S = 60.0
_PR_SET_PDEATHSIG = 1

Tell: TypeAlias = Callable[[str, Any], None]
Operations: TypeAlias = "list[list[Any]]"


def play_store(tell: Tell) -> None:
    """Serve a store until killed."""
    store, _, port = open_store(HOST)
    tell("port", port)
    while store is not None:
        time.sleep(1)


def play_member(
    tell: Tell,
    port: int,
    rank: int,
    operations: Operations,
    world_size: int = 0,
    members: list[int] | None = None,
    name: str = "all",
    timeout_s: float = DEADLINE_S,
) -> list[Any]:
    """Be ``rank`` of a group: one of ``world_size`` with a store of its own, whose port rank 0 tells, else of
    ``members`` on the store at ``port``. Returns what the operations did."""
    if members is not None:
        return perform(
            StatelessGroup(connect_store(HOST, port, timeout_s), 1, 1, name, rank, members), operations, tell
        )
    listener = None
    if rank == 0:
        listener, port = reserve_port(HOST, port)
        tell("port", port)
    group = StatelessGroup.create(HOST, port, rank, world_size, store_timeout=timeout_s, listener=listener)
    results = perform(group, operations, tell)
    group.close()
    return results


def play_two_groups(tell: Tell, ports: list[int], rank: int) -> list[Any]:
    """Ranks 0 and 1 share a group; while it is in use they form another with 2 and 3. Rank 0 tells the ports."""
    listeners: list[socket.socket | None] = [None, None]
    if rank == 0:
        reserved = [reserve_port(HOST), reserve_port(HOST)]
        listeners, ports = [listener for listener, _ in reserved], [port for _, port in reserved]
        tell("ports", ports)
    small = StatelessGroup.create(HOST, ports[0], rank, 2, listener=listeners[0]) if rank < 2 else None
    before = perform(small, [["all_gather_obj", f"small {rank}"]], tell) if small else []
    large = StatelessGroup.create(HOST, ports[1], rank, 4, listener=listeners[1])
    inside = perform(large, [["all_gather_obj", f"large {rank}"]], tell)
    after = perform(small, [["all_gather_obj", f"again {rank}"]], tell) if small else []
    for group in (small, large):
        if group is not None:
            group.close()
    return [*before, *inside, *after]


def perform(group: StatelessGroup, operations: Operations, tell: Tell) -> list[Any]:
    results = []
    for name, *arguments in operations:
        if name == "sleep":
            time.sleep(*arguments)
        elif name == "say":
            tell("reached", arguments[0])
        else:
            results.append(getattr(group, name)(*arguments))
    return results


PLAYS: dict[str, Callable[..., Any]] = {
    "store": play_store,
    "member": play_member,
    "two_groups": play_two_groups,
}


def play(order: dict[str, Any]) -> None:
    def tell(kind: str, what: Any) -> None:
        # One write of less than a pipe's atomic size: lines of several processes do not mix.
        os.write(1, json.dumps({"id": order["id"], "said": kind, "what": what}).encode() + b"\n")

    tell("pid", os.getpid())
    try:
        tell("done", PLAYS[order["play"]](tell, **order["arguments"]))
    except DrumlineError as error:
        tell("failed", [type(error).__name__, str(error)])


def main() -> None:
    libc = ctypes.CDLL(None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            play(json.loads(line))
            # Not through the interpreter's end: a thread that hangs on a stopped store would be joined there.
            os._exit(0)


if __name__ == "__main__":
    main()
