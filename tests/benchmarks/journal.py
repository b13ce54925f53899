"""What the journal costs the coordinator's loop, and how long a commit takes.

    python -m tests.benchmarks.journal [--rows 1024] [--steps 500] [--pace-ms 5] [--folder FOLDER]

Prints one line of JSON, times in microseconds: ``append`` is what the loop spends on a step of so many rows (make the
batch, hand it over), ``commit`` how long it is until what waits for that is called, ``unpaced`` how long a step takes
with all of them handed over at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop

from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.delivery import Delivery
from drumline.engine.journal import Journal
from drumline.engine.journal.batches import make_batch
from drumline.protocol.messages import I32, SamplingSpec, Submit

PROMPT = 512


def shown(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median": round(statistics.median(ordered) * 1e6, 1),
        "p99": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
        "max": round(ordered[-1] * 1e6, 1),
    }


def outputs(handles: I32, step: int) -> list[ConnectionOutput]:
    rows = len(handles)
    return [ConnectionOutput(1, handles, np.full(rows, step, np.int32), np.arange(rows, dtype=np.int32))]


async def measure(folder: str, rows: int, steps: int, pace_s: float) -> dict[str, object]:
    states: list[str] = []
    journal, _ = Journal.open(
        f"{folder}/journal.sqlite", 1, on_state=lambda state, _: states.append(state), on_superseded=states.append
    )
    delivery = Delivery(journal)
    prompt = np.arange(PROMPT, dtype=np.int32)
    requests = [Submit(1, f"request {row}", prompt, SamplingSpec(), 1 << 20, seed_given=True) for row in range(rows)]
    handles = np.arange(1, rows + 1, dtype=np.int32)
    accepted = asyncio.Event()
    notes = Notes(accepted=tuple((one, row + 1) for row, one in enumerate(requests)))
    delivery.push(make_batch(notes, []), accepted.set)
    await accepted.wait()
    appends: list[float] = []
    commits: list[float] = []
    for step in range(steps):
        out = outputs(handles, step)
        done = asyncio.Event()
        start = time.perf_counter()
        delivery.push(make_batch(None, out), done.set)
        handed = time.perf_counter()
        await done.wait()
        appends.append(handed - start)
        commits.append(time.perf_counter() - handed)
        await asyncio.sleep(pace_s)
    done = asyncio.Event()
    start = time.perf_counter()
    for step in range(steps, 2 * steps):
        delivery.push(make_batch(None, outputs(handles, step)), (lambda: None) if step + 1 < 2 * steps else done.set)
    await done.wait()
    unpaced = (time.perf_counter() - start) / steps
    journal.close()
    return {
        "rows": rows,
        "steps": steps,
        "append_us": shown(appends),
        "commit_us": shown(commits),
        "unpaced_us": round(unpaced * 1e6, 1),
        "states": states,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pace-ms", type=float, default=5.0)
    parser.add_argument("--folder", default=None, help="where the file is made; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = uvloop.run(measure(folder, options.rows, options.steps, options.pace_ms / 1000))
        found["file_bytes"] = Path(folder, "journal.sqlite").stat().st_size
        print(json.dumps(found))


if __name__ == "__main__":
    main()
