"""The fixture ``faulty_engine`` for the tests of whoever has drumline installed.

Imports nothing of drumline until a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from drumline.engine.config import EngineConfig
    from drumline.engine.testing.faulty_engine import FaultyEngine


@pytest.fixture
def faulty_engine() -> Iterator[Callable[[EngineConfig], FaultyEngine]]:
    """Makes :class:`~drumline.engine.testing.FaultyEngine` objects::

        async def test_streams_outlive_a_rank(faulty_engine):
            async with faulty_engine(EngineConfig(model="demo")) as faulty:
                await faulty.kill(0, at="decode")

    The test fails if it leaves one of them open, which is killed then.
    """
    from drumline.engine.testing.faulty_engine import FaultyEngine

    made: list[FaultyEngine] = []

    def make(config: EngineConfig, **options: object) -> FaultyEngine:
        faulty = FaultyEngine(config, **options)  # type: ignore[arg-type]
        made.append(faulty)
        return faulty

    yield make
    left_open: list[int] = []
    for faulty in made:
        if faulty.is_open:
            left_open.append(faulty.supervisor_pid)
            faulty.abandon()
    if left_open:
        pids = ", ".join(map(str, left_open))
        pytest.fail(f"an engine was left open (supervisor {pids}): use `async with faulty_engine(config) as faulty`")
