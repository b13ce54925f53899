"""A rank that is killed, whichever and whenever: every stream says what it says undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.faults.matrix import LAYOUTS, POINTS, dense, run


@pytest.mark.parametrize("rank", [0, 1])
async def test_streams_go_on_when_a_rank_is_killed_at_any_point(mark: str, rank: int) -> None:
    await run(LAYOUTS["dp2-ep"], [(point, rank) for point in POINTS], "dp2-ep")


@pytest.mark.parametrize(
    ("layout", "point", "rank"),
    [("dp4-ep", "regroup", 2), ("tp2-dp2-ep", "decode", 1), ("pp2-dp2-ep", "prefill", 3), ("tp2-dp2", "joining", 2)],
)
async def test_streams_go_on_in_other_layouts(mark: str, layout: str, point: str, rank: int) -> None:
    await run(LAYOUTS[layout], [(point, rank)], layout)


async def test_streams_of_a_dense_replica_go_on(mark: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llama", "llama")
    await run(dense(tmp_path / "llama"), [("decode", 0)], "llama-dp2")
