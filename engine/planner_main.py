"""The planner: solves placements in a process of its own, ``python -m drumline.engine.planner_main OWNER_PID``.

Requests come on stdin and plans go to stdout, in the frames of :mod:`drumline.engine.planner_frames`. It steps back
for whoever serves: a low priority, one thread. It ends with its stdin, and the kernel ends it with its owner, in the
middle of a solve too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

NICENESS = 10
_PR_SET_PDEATHSIG = 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _dies_with(int(sys.argv[1])):
        return 1
    os.nice(NICENESS)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    # A stray print must not end up among the plans.
    answers = os.dup(1)
    os.dup2(2, 1)
    # numpy reads that environment when it is imported, which is here.
    from drumline.engine.planner_solve import serve

    return serve(0, answers)


def _dies_with(owner: int) -> bool:
    """Have the kernel kill this process when the thread that started it ends; False when that has happened."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == owner


if __name__ == "__main__":
    sys.exit(main())
