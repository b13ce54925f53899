"""Seed after seed, or one of them."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable

from tests.simulation.cluster.day import run_schedule
from tests.simulation.cluster.schedule import Schedule, make_schedule
from tests.simulation.worker import RuleBrokenError


def replay(seed: int, verbose: bool, make: Callable[[int], Schedule] = make_schedule) -> int:
    """One seed, step by step."""
    schedule = make(seed)
    if verbose:
        print(schedule)
    try:
        seen = run_schedule(schedule, verbose)
    except RuleBrokenError:
        traceback.print_exc()
        return 1
    print(json.dumps({"seed": seed, "seen": seen}))
    return 0


def soak(
    first: int,
    runs: int,
    minutes: float,
    keep_going: bool = False,
    make: Callable[[int], Schedule] = make_schedule,
) -> int:
    """Seed after seed; a failing one is printed, and ends the run unless it is to go on."""
    began, used = time.monotonic(), time.process_time()
    seen: Counter[str] = Counter()
    failed: list[int] = []
    done = 0
    while done < runs and time.monotonic() - began < 60 * minutes:
        try:
            seen.update(run_schedule(make(first + done)))
        except RuleBrokenError as error:
            failed.append(first + done)
            if keep_going:
                print(str(error).splitlines()[0][:300], flush=True)
            else:
                traceback.print_exc()
        done += 1
        if failed and not keep_going:
            break
    cpu = round(time.process_time() - used, 1)
    print(json.dumps({"first_seed": first, "runs": done, "cpu_s": cpu, "failed_seeds": failed, "seen": seen}))
    return 1 if failed else 0
