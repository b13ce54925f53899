from __future__ import annotations

import os

import msgspec
import pytest

from drumline.protocol.messages import WorkerConfig
from drumline.workers.host_share import SMALL_MODEL_BYTES, choose_threads

CONFIG = WorkerConfig("m", "auto", 64, 4, 16, 16, 0, 0, 0.9, 1)


@pytest.mark.parametrize(
    ("given", "environment", "local_ranks", "weight_bytes", "expected"),
    [
        (0, None, 1, SMALL_MODEL_BYTES - 1, 1),
        (0, None, 1, SMALL_MODEL_BYTES, 8),
        (0, None, 3, SMALL_MODEL_BYTES, 2),
        (0, None, 20, SMALL_MODEL_BYTES, 1),
        (0, "5", 1, 1, 5),
        (0, "many", 1, SMALL_MODEL_BYTES, 8),
        (3, "5", 1, 1, 3),
    ],
)
def test_threads_follow_what_is_said_then_the_size_of_the_model_then_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    given: int,
    environment: str | None,
    local_ranks: int,
    weight_bytes: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    config = msgspec.structs.replace(CONFIG, num_threads=given, local_ranks=local_ranks)
    assert choose_threads(config, weight_bytes) == expected
