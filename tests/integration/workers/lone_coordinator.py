"""``python -m tests.integration.workers.lone_coordinator FOLDER MODEL``: a coordinator that can be stopped and killed.

It has rank 0 load and leave for epoch 1, says so on stdout, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from drumline.protocol.messages import WorkerConfig
from tests.integration.workers.processes import CoordinatorEnd, worker_config


def config_on_lease(model: Path | str) -> WorkerConfig:
    return worker_config(model, coordinator_lease_s=20.0)


async def run(folder: Path, model: str) -> None:
    config = config_on_lease(model)
    end = CoordinatorEnd(folder)
    await end.welcome(0, config)
    await end.load(0, config)
    await end.leave([0], 1)
    print("left", flush=True)
    await end.expect_beats(1000, timeout_s=60.0)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))
