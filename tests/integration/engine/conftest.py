"""Every test gets a private folder for sockets and a mark that its processes inherit; both must be empty afterwards."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.engine.processes import MARK, marked, wait_all_gone


@pytest.fixture
def runtime_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which engines make theirs; short, because it becomes part of a socket's path."""
    root = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, runtime_root: Path) -> Iterator[str]:
    """Marks the processes of this test; the test fails when one is left after it."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    shared_before = set(Path("/dev/shm").iterdir())
    yield value
    wait_all_gone(value, runtime_root)
    left = {path for path in Path("/dev/shm").iterdir() if "drumline" in path.name} - shared_before
    assert not left, f"left in /dev/shm: {left}"
    assert marked(value) == {}
