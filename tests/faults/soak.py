"""Faults for as long as you like: ``python -m tests.faults.soak --minutes 20``.

About half of the time every rank of every layout is killed at every point, in a random order; then the same in every
phase of experts that move, ranks are stopped for 20 s, coordinators killed, and hostile frames sent. ``--seed N``: in
the order of that run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from drumline.engine.config import EngineConfig
from drumline.engine.testing import FaultyEngine
from drumline.engine.testing.recovery import Spread
from tests import procfs
from tests.checkpoints import make_checkpoint
from tests.faults.hostile_soak import hostile
from tests.faults.matrix import LAYOUTS, POINTS, dense, run
from tests.faults.shuffles import Shuffles, balanced
from tests.faults.streams import Streams
from tests.faults.test_coordinator_killed import kill_coordinators, kill_rank_and_coordinator
from tests.faults.test_stopped import TWO, sleep_after_a_death, sleep_idle, sleep_through

Phase = Callable[[random.Random, float], Coroutine[None, None, None]]
COORDINATORS = 20
ASLEEP_S = 20.0
SILENCE_S = 10.0
"""A rank not heard for so long is lost, even in the first steps of its process, which may take longer."""
AFTER_A_DEATH = ("regroup", "joining", "loading")
RANKS = {"dp4-ep": 4, "tp2-dp2-ep": 4, "pp2-dp2-ep": 4, "tp2-dp2": 4}
LEAST_S = 20.0
"""Of each layout: its engine starts, and one fault happens."""


def until(end: float) -> Callable[[], bool]:
    """Whether there is time left, asked after each thing that is done: the first one is always done."""
    asked = 0

    def more() -> bool:
        nonlocal asked
        asked += 1
        return asked == 1 or time.monotonic() < end

    return more


async def kills(rng: random.Random, seconds: float) -> None:
    """All ranks, all points, all layouts."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "llama", "llama")
        layouts: list[tuple[str, EngineConfig]] = [*LAYOUTS.items(), ("llama-dp2", dense(Path(folder) / "llama"))]
        rng.shuffle(layouts)
        start = time.monotonic()
        for number, (name, config) in enumerate(layouts):
            faults = [(point, rank) for point in POINTS for rank in range(RANKS.get(name, 2))]
            rng.shuffle(faults)
            end = start + (number + 1) * seconds / len(layouts)
            streams = await run(config, faults, name, until(end))
            times += [one for some in streams.gaps.times.values() for one in some]
    all_of = Spread.of(times)
    print(f"all kills: {all_of.count} times, p50 {1e3 * all_of.p50_s:.0f} ms, p99 {1e3 * all_of.p99_s:.0f} ms")


async def stops(rng: random.Random, seconds: float) -> None:
    """Ranks that sleep: now, at every point that comes by itself, and at those that another death brings about."""
    more = until(time.monotonic() + seconds)
    async with FaultyEngine(TWO) as faulty:
        streams = await Streams.learned(faulty.engine)
        for rank in range(2):
            if more():
                await _report_sleep(rank, "idle", sleep_idle(faulty, streams, rank, ASLEEP_S))
        points = [
            (rank, at) for rank in range(2) for at in (None, "prefill", "decode", "regroup", "joining", "loading")
        ]
        rng.shuffle(points)
        async with streams.running():
            await streams.move_on()
            for rank, at in points:
                if not more():
                    break
                sleep = sleep_after_a_death if at in AFTER_A_DEATH else sleep_through
                await _report_sleep(rank, at, sleep(faulty, streams, rank, ASLEEP_S, at))
        print("\n" + streams.report("stopped"))


async def _report_sleep(rank: int, at: str | None, sleep: Coroutine[Any, Any, float]) -> None:
    took = await sleep
    print(f"rank {rank} stopped for {ASLEEP_S:.0f} s at {at or 'any moment'}: all streams moved on after {took:.2f} s")
    assert took < SILENCE_S + 1.0, f"streams stood still for {took:.1f} s"


async def shuffles(rng: random.Random, seconds: float) -> None:
    """Every rank in every phase of experts that move, and who plans and coordinates that, in layouts with EP."""
    layouts = [name for name in LAYOUTS if name.endswith("-ep")]
    rng.shuffle(layouts)
    start = time.monotonic()
    for number, name in enumerate(layouts):
        more = until(start + (number + 1) * seconds / len(layouts))
        async with Shuffles.of(balanced(name)) as moving:
            faults = _faults_of_shuffles(moving, RANKS.get(name, 2))
            rng.shuffle(faults)
            for fault in faults:
                if not more():
                    break
                await fault()
        print(f"{name}: {len(moving.done)} ends while experts moved")


def _faults_of_shuffles(moving: Shuffles, ranks: int) -> list[Callable[[], Coroutine[None, None, None]]]:
    faults: list[Callable[[], Coroutine[None, None, None]]] = [moving.kill_coordinator, moving.kill_planner]
    for rank in range(ranks):
        faults += [
            partial(moving.kill_while_planning, rank),
            partial(moving.kill_at, "staging", rank),
            partial(moving.kill_when_half_are_staged, rank, of_those=False),
            partial(moving.kill_when_half_are_staged, rank, of_those=True),
            partial(moving.kill_at, "commit", rank),
            partial(moving.kill_after_the_commit, rank),
            partial(moving.stop_at_staging, rank, ASLEEP_S),
        ]
    return faults


async def coordinators(rng: random.Random, seconds: float) -> None:
    """One coordinator after the other, then one in the middle of a recovery."""
    more = until(time.monotonic() + seconds)
    async with FaultyEngine(LAYOUTS["dp2-ep"]) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            killed = 0
            while killed < COORDINATORS and more():
                await kill_coordinators(faulty, streams, 1)
                killed += 1
            await kill_rank_and_coordinator(faulty, streams, rng.randrange(2))
        print("\n" + streams.report(f"{killed} coordinators"))


PHASES: tuple[tuple[str, float, Phase], ...] = (
    ("kills", 0.45, kills),
    ("shuffles", 0.15, shuffles),
    ("stops", 0.15, stops),
    ("coordinators", 0.1, coordinators),
    ("hostile", 0.15, hostile),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", choices=[name for name, _, _ in PHASES], help="all of the time for one part")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"seed {seed}")
    for name, share, phase in PHASES:
        if arguments.only not in (None, name):
            continue
        seconds = 60 * arguments.minutes * (1.0 if arguments.only else share)
        try:
            asyncio.run(phase(random.Random(seed), seconds))
        except Exception:
            traceback.print_exc()
            print(f"{name} failed with seed {seed}")
            return 1
    left = procfs.descendants(os.getpid())
    if left:
        print(f"left alive: {[procfs.command(pid) for pid in left]}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
