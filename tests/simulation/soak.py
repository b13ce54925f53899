"""Random scenarios for as long as you like: ``python -m tests.simulation.soak --minutes 20``, a quarter of it with the
core alone, the rest with whole engines, in half of that with experts that move. ``--seed N`` replays one of the core;
``python -m tests.simulation.cluster --seed N -v`` one of an engine, ``--experts --seed N`` one with experts."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter

from tests.simulation.cluster import soak as cluster
from tests.simulation.cluster.moving import make_moving_schedule
from tests.simulation.scenario import make_scenario
from tests.simulation.simulation import run_scenario
from tests.simulation.worker import RuleBrokenError

CORE_ALONE = 0.25
EXPERTS = 0.375


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="run this one scenario and stop")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(make_scenario(arguments.seed), file=sys.stderr)
        return replay(arguments.seed)
    alone = arguments.minutes * CORE_ALONE
    failed = soak(alone)
    failed = failed or cluster.soak(_any_seed(), 1 << 60, arguments.minutes * EXPERTS, make=make_moving_schedule)
    return failed or cluster.soak(_any_seed(), 1 << 60, arguments.minutes - alone - arguments.minutes * EXPERTS)


def _any_seed() -> int:
    return random.SystemRandom().randrange(1 << 40)


def replay(seed: int) -> int:
    try:
        seen = run_scenario(make_scenario(seed))
    except RuleBrokenError:
        traceback.print_exc()
        return 1
    print(json.dumps({"seed": seed, "seen": seen}))
    return 0


def soak(minutes: float) -> int:
    """Seeds from a random start, so that no two soaks are the same; a failing one is printed and ends the run."""
    seed = _any_seed()
    end = time.monotonic() + 60 * minutes
    seen: Counter[str] = Counter()
    runs = 0
    while time.monotonic() < end:
        try:
            seen.update(run_scenario(make_scenario(seed + runs)))
        except RuleBrokenError:
            traceback.print_exc()
            print(json.dumps({"failed_seed": seed + runs, "runs": runs}))
            return 1
        runs += 1
    print(json.dumps({"first_seed": seed, "runs": runs, "seen": seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
