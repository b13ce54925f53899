"""What the placement policies make of loads that stand still, drift and shake.

    python -m tests.benchmarks.placement [--seed 0] [--times 8] [--window 8] [--shapes 4] [--profile]

Prints, for each shape and load of :mod:`tests.benchmarks.expert_loads`, a line per policy. Plans are made at each time,
each from the placement before, the first from all experts and then copies in turn. ``incremental`` sees the last
``window`` loads, the others the one of their time. Columns: CPU milliseconds of a plan (median); balancedness on the
load that it was made for, after the third plan and the least since, and the least by which it is above that of
``global``; on the next load, the mean since; slots moved (%) by the first three plans and by the mean and the largest
since; GB between ranks (mean since). For ``noise`` the load of the start stands for that of the time. ``--profile``:
where the time of a plan for the first shape goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drumline.engine.core.balance.measure import balancedness
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32Matrix
from tests.benchmarks.expert_loads import F64, KINDS, SHAPES, START, Shape, make

EXPERT_BYTES = 44_040_192
"""An expert of DeepSeek-R1 in FP8."""
POLICIES = ("hierarchical", "global", "incremental")
GB = 1e9


@dataclass(slots=True)
class Series:
    """The plans of one policy over one load, by time."""

    plans: list[PlacementPlan]
    now: list[float]
    following: list[float]


def request_at(shape: Shape, policy: str, loads: F64, placement: I32Matrix) -> PlanRequest:
    """For the last of ``loads``; ``incremental`` sees them all."""
    seen = loads if policy == "incremental" else loads[-1:]
    return PlanRequest(
        number=0,
        policy=policy,
        num_layers=shape.layers,
        load=seen.reshape(-1, shape.experts).astype(np.float32),
        placement=placement,
        slots=np.asarray(slots_per_rank(shape.slots, shape.ranks), dtype=np.int32),
        nodes=np.repeat(np.arange(shape.nodes, dtype=np.int32), shape.ranks // shape.nodes),
        dead=np.zeros(0, dtype=np.int32),
        num_groups=shape.groups,
        expert_bytes=EXPERT_BYTES,
    )


def first_placement(shape: Shape) -> I32Matrix:
    """All experts, then copies of them in turn."""
    return np.tile(np.arange(shape.slots, dtype=np.int32) % shape.experts, (shape.layers, 1))


def run(shape: Shape, kind: str, policy: str, loads: F64, window: int) -> Series:
    """Plan at each time."""
    series, placement = Series([], [], []), first_placement(shape)
    ranks = np.repeat(np.arange(shape.ranks), slots_per_rank(shape.slots, shape.ranks))
    for now in range(len(loads)):
        seen = loads[max(0, now + 1 - window) : now + 1]
        plan = make_plan(request_at(shape, policy, seen, placement), time.process_time)
        if plan.error:
            raise RuntimeError(plan.error)
        placement = plan.placement
        judged = loads[0] if kind == "noise" else loads[now]
        series.plans.append(plan)
        series.now.append(float(balancedness(judged, placement, ranks).mean()))
        series.following.append(float(balancedness(loads[min(now + 1, len(loads) - 1)], placement, ranks).mean()))
    return series


def show(shape: Shape, policy: str, series: Series, best: Series) -> str:
    """One line."""
    total = shape.layers * shape.slots
    moved = [100.0 * plan.slots_moved / total for plan in series.plans]
    later = slice(START, None)
    above = min(one - other for one, other in zip(series.now[START - 1 :], best.now[START - 1 :], strict=True))
    return (
        f"  {policy:13}{statistics.median(plan.solve_ms for plan in series.plans):7.1f} ms"
        f"  {series.now[START - 1]:.4f} {min(series.now[later]):.4f} {above:+.4f}"
        f"  next {statistics.mean(series.following[later]):.4f}"
        f"  moved {' '.join(f'{one:.1f}' for one in moved[:START])} / {statistics.mean(moved[later]):.1f}"
        f" {max(moved[later]):.1f} %"
        f"  {statistics.mean(plan.bytes_moved for plan in series.plans[later]) / GB:.1f} GB"
    )


def profile(shape: Shape, seed: int) -> None:
    """Where the time of plans under drift goes."""
    loads, placement = make("drift", START + 9, shape.layers, shape.experts, seed), first_placement(shape)
    profiler, times = cProfile.Profile(time.process_time), []
    for now, load in enumerate(loads):
        request = request_at(shape, "incremental", load[None], placement)
        times.append((make_plan(request, time.process_time)).solve_ms)
        if now >= START:
            profiler.enable()
        placement = make_plan(request, time.process_time).placement
        profiler.disable()
    print(f"{shape}, drift: {statistics.median(times[START:]):.1f} ms without the profiler (median of 9 plans)")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(18)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="placement", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    if options.profile:
        profile(SHAPES[0], options.seed)
        return 0
    for shape in SHAPES[: options.shapes]:
        for kind in KINDS:
            print(f"{shape} {kind}")
            loads = make(kind, max(options.times, START + 2), shape.layers, shape.experts, options.seed)
            series = {policy: run(shape, kind, policy, loads, options.window) for policy in POLICIES}
            for policy in POLICIES:
                print(show(shape, policy, series[policy], series["global"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
