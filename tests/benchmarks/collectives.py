"""How long collectives take, over memory that the ranks share and over gloo.

    python -m tests.benchmarks.collectives [--ranks 2 4] [--rows 1 8 64] [--width 256] [--rounds 300]

Prints a line per operation and size: the median on rank 0 in microseconds, both ways, in float32. The ranks are
processes of this machine that enter each operation as soon as they have left the one before.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from drumline.workers.abort import AbortFlag
from drumline.workers.groups import GroupCoordinator, GroupPlace, form_group
from drumline.workers.progress import Progress

WARM_UP = 20


def _operations(group: GroupCoordinator, rows: int, width: int) -> dict[str, Callable[[], object]]:
    tensor = torch.randn(rows, width)
    arriving = torch.empty(group.size * rows, width)
    wide, splits = torch.randn(group.size * rows, width), [rows] * group.size

    def pass_on() -> None:
        """Around the ring once."""
        if not group.is_first_rank:
            group.recv((rows, width), torch.float32, group.prev_rank)
        group.send(tensor, group.next_rank)
        if group.is_first_rank:
            group.recv((rows, width), torch.float32, group.prev_rank)

    return {
        "all_reduce": lambda: group.all_reduce(tensor),
        "all_gather": lambda: group.all_gather(tensor),
        "reduce_scatter": lambda: group.reduce_scatter(wide),
        "all_to_all": lambda: group.all_to_all(arriving, wide, splits, splits),
        "broadcast": lambda: group.broadcast(tensor, group.first_rank),
        "gather": lambda: group.gather(tensor, group.first_rank),
        "ring of sends": pass_on,
    }


def _median_us(operation: Callable[[], object], rounds: int) -> float:
    for _ in range(WARM_UP):
        operation()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def _run_rank(rank: int, size: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    figures: dict[tuple[int, str], list[float]] = {}
    for share in (True, False):
        place = GroupPlace(1, 1, rank, tuple(range(size)), "127.0.0.1", port, torch.device("cpu"))
        name = "memory" if share else "sockets"
        group = form_group(name, place, AbortFlag(), Progress(), connect=True, share=share)
        if (group.mailboxes is not None) != share:
            raise SystemExit("the ranks of this machine share no memory")
        for rows in options.rows:
            for title, operation in _operations(group, rows, options.width).items():
                group.barrier(60.0)
                figures.setdefault((rows, title), []).append(_median_us(operation, options.rounds))
        group.barrier(60.0)
        group.close()
    if rank == 0:
        for (rows, title), (memory, sockets) in figures.items():
            print(f"{size:5} {rows:5} {title:15} {memory:10.0f} {sockets:10.0f}", flush=True)


def _run(size: int, options: argparse.Namespace) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            store = None
            if rank == 0:
                descriptor, limit = listener.fileno(), timedelta(seconds=60)
                store = TCPStore("127.0.0.1", port, None, True, limit, False, master_listen_fd=descriptor)
            _run_rank(rank, size, port, options)
            if store is not None:
                time.sleep(0.5)  # it serves the others while they end
            os._exit(0)
        pids.append(pid)
    listener.close()
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        sys.exit("a rank failed")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args(arguments)
    print(f"{'ranks':>5} {'rows':>5} {'operation':15} {'memory us':>10} {'gloo us':>10}", flush=True)
    for size in options.ranks:
        _run(size, options)


if __name__ == "__main__":
    main()
