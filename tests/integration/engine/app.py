"""An app that embeds an engine, to be killed: ``python -m tests.integration.engine.app [--inline]``.

Prints a line when it begins to start, when it is ready and for each token.
"""

from __future__ import annotations

import asyncio
import sys

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.sampling_params import SamplingParams


async def main() -> None:
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True)
    print("start", flush=True)
    async with AsyncEngine(EngineConfig("demo", parallel=parallel, inline="--inline" in sys.argv)) as engine:
        print("ready", flush=True)
        while True:
            params = SamplingParams(max_tokens=500, temperature=0.8, seed=1, ignore_eos=True)
            async for output in engine.generate("The", params):
                print(f"token {len(output.token_ids)}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
