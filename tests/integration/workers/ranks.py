"""Runs a scenario on real rank processes.

``python -m tests.integration.workers.ranks`` imports torch once and reads requests from stdin, one JSON object a line:
``{"scenario": NAME, "world": N, "way": WAY}``. For each it forks N ranks that meet on a store of their own, and answers
with one line: ``{"results": [what rank 0 returned, ...], "errors": [...]}``. The way is "sockets", "memory" or
"all_to_all", an exchange of its own over memory.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.workers.abort import AbortFlag
from drumline.workers.experts.all_to_all import AllToAllExchange
from drumline.workers.experts.exchange import GatherExchange
from drumline.workers.experts.shared import SharedExchange
from drumline.workers.groups import GroupCoordinator, GroupPlace, form_group
from drumline.workers.layers.moe import ExpertExchange
from drumline.workers.progress import Progress
from tests.integration.workers import group_faults, group_scenarios, rearrange_scenarios, scenarios

SCENARIO_DEADLINE_S = 20.0
_MODULES = (scenarios, group_scenarios, group_faults, rearrange_scenarios)


@dataclass
class Rank:
    """What a scenario works with."""

    rank: int
    world: int
    port: int
    abort: AbortFlag
    progress: Progress
    way: str

    def exchange(self) -> ExpertExchange:
        self.group = self.form()
        if self.way == "all_to_all":
            return AllToAllExchange(self.group, self.group.device)
        if self.way == "sockets":
            return GatherExchange(self.group)
        if self.group.mailboxes is None:
            raise AssertionError("ranks of one host share no memory")
        return SharedExchange(self.group, self.group.mailboxes)

    def form(self, epoch: int = 1, deadline_s: float = 10.0, world: int | None = None) -> GroupCoordinator:
        members = tuple(range(self.world if world is None else world))
        return self.form_among("experts", members, epoch, deadline_s)

    def form_among(
        self, name: str, members: tuple[int, ...], epoch: int = 1, deadline_s: float = 10.0, **changes: Any
    ) -> GroupCoordinator:
        """A group of some ranks, over sockets alone where the way is "sockets"."""
        place = GroupPlace(1, epoch, self.rank, members, "127.0.0.1", self.port, torch.device("cpu"))
        changes = {"share": self.way != "sockets"} | changes
        return form_group(name, place, self.abort, self.progress, deadline_s, **changes)


def _run_rank(rank: int, world: int, listener: socket.socket, scenario: str, way: str, answer: int) -> None:
    torch.set_num_threads(1)
    port = listener.getsockname()[1]
    store = None
    if rank == 0:
        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
            timeout=timedelta(seconds=10),
        )
    try:
        module = next(module for module in _MODULES if hasattr(module, scenario))
        function: Callable[[Rank], Any] = getattr(module, scenario)
        outcome = {"value": function(Rank(rank, world, port, AbortFlag(), Progress(), way))}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    os.write(answer, json.dumps(outcome).encode())
    os.close(answer)
    if store is not None:  # the store is the others' too: it stays until the parent has heard from all
        signal.sigwait({signal.SIGTERM})
    os._exit(0)


def _answer(pid: int, fd: int, deadline: float) -> bytes:
    """What a rank said; nothing when it is dead or has stopped itself."""
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.05)[0]:
            return os.read(fd, 1 << 20)
        if os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
            return b""
    return b'{"error": "no answer in time"}'


def run(scenario: str, world: int, way: str) -> dict[str, Any]:
    listener = socket.create_server(("127.0.0.1", 0))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pids, answers = [], []
    for rank in range(world):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _run_rank(rank, world, listener, scenario, way, write_end)
        os.close(write_end)
        pids.append(pid)
        answers.append(read_end)
    listener.close()
    results, errors = [], []
    deadline = time.monotonic() + SCENARIO_DEADLINE_S
    for rank, (pid, fd) in enumerate(zip(pids, answers, strict=True)):
        data = _answer(pid, fd, deadline)
        os.close(fd)
        outcome = json.loads(data) if data else {"value": None}
        results.append(outcome.get("value"))
        if "error" in outcome:
            errors.append(f"rank {rank}: {outcome['error']}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"results": results, "errors": errors}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["scenario"], request["world"], request.get("way", "sockets"))), flush=True)


if __name__ == "__main__":
    main()
