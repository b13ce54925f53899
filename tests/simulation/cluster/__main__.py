"""Random days of a whole engine: ``python -m tests.simulation.cluster --minutes 20``; ``--seed N -v`` replays one."""

from __future__ import annotations

import argparse
import random
import sys

from tests.simulation.cluster.moving import make_moving_schedule
from tests.simulation.cluster.schedule import make_schedule
from tests.simulation.cluster.soak import replay, soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, help="run this one and stop")
    parser.add_argument("--first", type=int, help="begin with this seed")
    parser.add_argument("--runs", type=int, default=1 << 60, help="at most so many")
    parser.add_argument("--keep-going", action="store_true", help="print failing seeds and go on")
    parser.add_argument("--experts", action="store_true", help="days on which experts move")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what happens")
    arguments = parser.parse_args()
    make = make_moving_schedule if arguments.experts else make_schedule
    if arguments.seed is not None:
        return replay(arguments.seed, arguments.verbose, make)
    first = random.SystemRandom().randrange(1 << 40) if arguments.first is None else arguments.first
    return soak(first, arguments.runs, arguments.minutes, arguments.keep_going, make)


if __name__ == "__main__":
    sys.exit(main())
