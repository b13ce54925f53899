"""Every model in every layout against transformers: ``python -m tests.parity.soak_layouts [--only TEXT]``.

Runs each of the cases once and is bounded by their number; exits with 1 when any is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.checkpoints import Checkpoints
from tests.parity.layout_cases import MAIN_CASES, OTHER_CASES
from tests.parity.process_layouts import run_case

CASE_DEADLINE_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose title holds this text")
    only = parser.parse_args().only
    cases = [case for case in (*MAIN_CASES, *OTHER_CASES) if only in case.title]
    failed = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for number, case in enumerate(cases, 1):
            try:
                judgement = asyncio.run(asyncio.wait_for(run_case(case, checkpoints), CASE_DEADLINE_S))
            except Exception as error:  # one broken layout must not hide the others
                failed.append(case.title)
                print(f"{number}/{len(cases)} {case.title}: {type(error).__name__}: {error}", flush=True)
                continue
            if not judgement.passed:
                failed.append(case.title)
            print(f"{number}/{len(cases)} {'ok' if judgement.passed else 'WRONG'} {judgement.line()}", flush=True)
    print(f"{len(cases)} cases, {len(failed)} failed {failed} in {time.monotonic() - started:.0f} s")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
