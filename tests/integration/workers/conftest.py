from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from tests.checkpoints import checkpoints
from tests.integration.workers.processes import CoordinatorEnd, ForkServerProcess

__all__ = ["checkpoints"]


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServerProcess]:
    """One forkserver for all tests that leave it alive."""
    server = ForkServerProcess(tmp_path_factory.mktemp("forkserver") / "stderr")
    yield server
    assert server.close() == 0


@pytest.fixture
def own_forkserver(tmp_path: Path) -> Iterator[ForkServerProcess]:
    """A forkserver that the test may kill."""
    server = ForkServerProcess(tmp_path / "stderr")
    yield server
    server.process.kill()
    server.close()


@pytest_asyncio.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[CoordinatorEnd]:
    end = CoordinatorEnd(tmp_path)
    yield end
    end.close()


class RunRanks(Protocol):
    def __call__(self, scenario: str, world: int, way: str = "sockets") -> list[Any]: ...


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RunRanks]:
    """Runs a scenario of ``scenarios.py`` on that many rank processes; returns what each of them returned."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.workers.ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(scenario: str, world: int, way: str = "sockets") -> list[Any]:
        stdin.write(json.dumps({"scenario": scenario, "world": world, "way": way}) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        assert not answer["errors"], "\n".join(answer["errors"])
        results: list[Any] = answer["results"]
        return results

    yield run
    stdin.close()
    assert process.wait(10) == 0
    stdout.close()
