"""A rank that is killed, whichever and whenever: every stream says what it says undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.faults.matrix import LAYOUTS, POINTS, dense, run

TOKENS = 60


def show(layout: str, gaps: dict[str, object]) -> None:
    print()
    for point, one in gaps.items():
        print(f"{layout} {point}: {one}")


@pytest.mark.parametrize("rank", [0, 1])
async def test_streams_go_on_when_a_rank_is_killed_at_any_point(mark: str, rank: int) -> None:
    show("dp2-ep", dict(await run(LAYOUTS["dp2-ep"], [(point, rank) for point in POINTS], TOKENS)))


@pytest.mark.parametrize(
    ("layout", "point", "rank"),
    [("dp4-ep", "regroup", 2), ("tp2-dp2-ep", "decode", 1), ("pp2-dp2-ep", "prefill", 3), ("tp2-dp2", "joining", 2)],
)
async def test_streams_go_on_in_other_layouts(mark: str, layout: str, point: str, rank: int) -> None:
    show(layout, dict(await run(LAYOUTS[layout], [(point, rank)], TOKENS)))


async def test_streams_of_a_dense_replica_go_on(mark: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llama", "llama")
    show("llama-dp2", dict(await run(dense(tmp_path / "llama"), [("decode", 0)], TOKENS)))
