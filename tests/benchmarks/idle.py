"""How much of a core an idle engine uses, all of its processes and the app together.

    python -m tests.benchmarks.idle [--seconds 30] [--data-parallel-size 2] [--inline]

Prints one line of JSON: the share of one core over the window, and each process's part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.sampling_params import SamplingParams
from tests import procfs


def cpu_seconds() -> dict[str, float]:
    """User and system time by process, this one and all below it."""
    times: dict[str, float] = {}
    for pid in [os.getpid(), *procfs.descendants(os.getpid())]:
        words = [word for word in procfs.command(pid).split() if word.startswith("drumline.")]
        own_name = procfs.name(pid)
        shown = own_name if own_name.startswith("drumline:") else (words or ["app"])[0]
        times[f"{shown} {pid}"] = procfs.cpu_seconds(pid)
    return times


async def idle_share(config: EngineConfig, seconds: float) -> dict[str, object]:
    """Serve one request, wait until the wave has closed, then measure for ``seconds``."""
    async with AsyncEngine(config) as engine:
        async for _ in engine.generate("The", SamplingParams(max_tokens=4, temperature=0.0)):
            pass
        await asyncio.sleep(1.0)
        before, start = cpu_seconds(), time.monotonic()
        await asyncio.sleep(seconds)
        after, window = cpu_seconds(), time.monotonic() - start
    used = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        "window_s": round(window, 2),
        "core_percent": round(100 * sum(used.values()) / window, 3),
        "processes_percent": {name: round(100 * value / window, 3) for name, value in used.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=2)
    parser.add_argument("--inline", action="store_true")
    options = parser.parse_args()
    size = options.data_parallel_size
    parallel = ParallelConfig(data_parallel_size=size, enable_expert_parallel=size > 1)
    config = EngineConfig("demo", parallel=parallel, inline=options.inline)
    print(json.dumps(asyncio.run(idle_share(config, options.seconds))))


if __name__ == "__main__":
    main()
