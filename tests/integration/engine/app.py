"""An app that embeds an engine, to be killed: ``python -m tests.integration.engine.app [--inline] [--external|--uni]
[--journal=PATH]``.

Prints a line when it begins to start, when it is ready and for each token. With --external it starts the ranks itself,
in sessions of their own, so that they outlive it unless they notice its end. With --journal its request is "kept".
"""

from __future__ import annotations

import asyncio
import subprocess
import sys

import msgspec

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event


async def main() -> None:
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True)
    if "--external" in sys.argv:
        parallel = msgspec.structs.replace(parallel, distributed_executor_backend="external_launcher")
    elif "--uni" in sys.argv:
        parallel = ParallelConfig(distributed_executor_backend="uni")
    journal = next((one.removeprefix("--journal=") for one in sys.argv if one.startswith("--journal=")), None)
    config = EngineConfig("demo", parallel=parallel, inline="--inline" in sys.argv, journal=journal)

    def on_event(event: Event) -> None:
        if event.kind == "waiting" and engine.launch is not None:
            for rank in engine.launch.ranks:
                subprocess.Popen(engine.launch.command(rank), start_new_session=True)

    print("start", flush=True)
    engine = AsyncEngine(config, on_event=on_event)
    async with engine:
        print("ready", flush=True)
        while True:
            params = SamplingParams(max_tokens=500, temperature=0.8, seed=1, ignore_eos=True)
            async for output in engine.generate("The", params, "kept" if journal else None):
                print(f"token {len(output.token_ids)}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
