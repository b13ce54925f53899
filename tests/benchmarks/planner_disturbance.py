"""What a placement solve costs the coordinator's steps: in the planner's process, and in a thread for comparison.

    python -m tests.benchmarks.planner_disturbance [--rows 1024] [--interval-ms 2] [--steps 2000]

The real core plans, encodes, decodes and applies a step of all rows whenever another process, as a rank does, has
answered the last one after a while. A step takes from that answer until it is done, so whatever holds up the loop
counts. Blocks of steps without a solve, with the planner's process solving all the time, and with a thread solving all
the time take turns, so that other work on the machine meets all alike. Prints one line of JSON, microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
import time
from collections.abc import Awaitable, Callable

import numpy as np
import uvloop

from drumline.engine.bench.eplb import EplbSetup
from drumline.engine.bench.eplb_loads import synthetic_loads
from drumline.engine.bench.scheduler import MAX_STEPS, WARM_UP, _Bench, _Times, machine
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.engine.launch.planner import Planner

BLOCK = 100
RANK = """
import os, struct, sys, time
while os.read(0, 1):
    time.sleep(float(sys.argv[1]))
    os.write(1, struct.pack("d", time.perf_counter()))
"""
Solve = Callable[[PlanRequest], Awaitable[PlacementPlan]]


def request(policy: str) -> PlanRequest:
    """58 layers of 256 experts in 288 slots on 32 ranks of 4 nodes, from the placement that everything starts with."""
    setup = EplbSetup(slots=288, ranks=32, nodes=4, groups=8, policy=policy)
    load = synthetic_loads("lognormal", 1, 58, 256)[0].astype(np.float32)
    slots, nodes, none = setup.slot_counts(), setup.node_of_rank(), np.zeros(0, dtype=np.int32)
    return PlanRequest(1, policy, 58, load, setup.start(58, 256), slots, nodes, none, setup.groups)


class Steps:
    """A core of ``rows`` rows and a process that plays its rank. ``took``: microseconds, one entry per step."""

    def __init__(self, rows: int, interval_s: float) -> None:
        self._bench = _Bench(1, rows, aligned=False)
        self._bench.run(WARM_UP)
        self._interval_s = interval_s
        self.took: list[float] = []

    async def block(self) -> None:
        """``BLOCK`` steps."""
        pipe = asyncio.subprocess.PIPE
        rank = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RANK, str(self._interval_s), stdin=pipe, stdout=pipe
        )
        assert rank.stdin is not None
        assert rank.stdout is not None
        for _ in range(BLOCK):
            rank.stdin.write(b".")
            (due,) = struct.unpack("d", await rank.stdout.readexactly(8))
            self._bench._step(_Times())
            self.took.append((time.perf_counter() - due) * 1e6)
        rank.stdin.close()
        await rank.wait()


async def solve_until(over: asyncio.Event, solve: Solve, asked: PlanRequest, solve_ms: list[float]) -> None:
    while not over.is_set():
        plan = await solve(asked)
        if plan.error:
            raise RuntimeError(plan.error)
        solve_ms.append(plan.solve_ms)


async def in_a_thread(asked: PlanRequest) -> PlacementPlan:
    return await asyncio.to_thread(make_plan, asked, time.perf_counter)


async def measure(options: argparse.Namespace) -> dict[str, object]:
    planner, asked = Planner(), request(options.policy)
    await planner.plan(asked)
    kinds: dict[str, Solve | None] = {"without": None, "process": planner.plan, "thread": in_a_thread}
    steps = {kind: Steps(options.rows, options.interval_ms / 1000) for kind in kinds}
    solve_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.steps // BLOCK):
        for kind, solve in kinds.items():
            over = asyncio.Event()
            async with asyncio.TaskGroup() as solving:
                if solve is not None:
                    solving.create_task(solve_until(over, solve, asked, solve_ms[kind]))
                await asyncio.sleep(0)
                await steps[kind].block()
                over.set()
    await planner.close()
    figures = {kind: one | {"solves": len(solve_ms[kind])} for kind, one in summary(steps).items()}
    return {"cpu": machine().cpu, "cores": machine().cores, "rows": options.rows, "steps_us": figures} | {
        "solve_ms": {kind: round(float(np.median(times)), 1) for kind, times in solve_ms.items() if times}
    }


def summary(steps: dict[str, Steps]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            "median": round(float(np.median(one.took)), 1),
            "p99": round(float(np.percentile(one.took, 99)), 1),
            "max": round(max(one.took), 1),
        }
        for kind, one in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--interval-ms", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=2000, help=f"of each kind, at most {MAX_STEPS - 2 * WARM_UP}")
    parser.add_argument("--policy", default="incremental")
    print(json.dumps(uvloop.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
