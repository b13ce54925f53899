"""Other people's tests get the fixture from drumline itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.engine.conftest import mark, runtime_root

__all__ = ["mark", "runtime_root"]

THEIRS = """
from drumline.engine import EngineConfig, SamplingParams

CONFIG = EngineConfig(model="demo")


async def test_served(faulty_engine):
    async with faulty_engine(CONFIG) as faulty:
        async for output in faulty.engine.generate("The", SamplingParams(temperature=0.0, max_tokens=4)):
            pass
        assert output.finished


async def test_left_open(faulty_engine):
    await faulty_engine(CONFIG).__aenter__()
"""


def test_the_fixture_makes_engines_and_fails_who_leaves_one_open(mark: str, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "drumline.engine.testing.pytest_plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-o", "asyncio_mode=auto", "-q", "-rA", "-c", "/dev/null", "."],
        cwd=tmp_path,
        # Not twice: the package that is installed may bring it already.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "PASSED test_theirs.py::test_served" in done.stdout, done.stdout + done.stderr
    assert "ERROR test_theirs.py::test_left_open" in done.stdout
    assert "an engine was left open (supervisor " in done.stdout
    assert done.returncode == 1


def test_the_package_declares_the_plugin() -> None:
    project = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    _, _, entry = project.partition("[project.entry-points.pytest11]\n")
    assert entry.splitlines()[0] == 'drumline = "drumline.engine.testing.pytest_plugin"'
