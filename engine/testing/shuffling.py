"""Experts that are moved on purpose: to another placement and back, so that there is always something to move."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from drumline.engine.client import AsyncEngine
from drumline.protocol.errors import DrumlineError, EngineClosed, InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32Matrix, RebalanceReport

KEPT = 50
AFTER_ERROR_S = 0.3
Row = np.ndarray[Any, np.dtype[np.int32]]


def turned(placement: I32Matrix, slots: Sequence[int]) -> I32Matrix:
    """``placement``, int32 (layers, physical slots), with the experts of each layer on other ranks: its slots shifted
    by as many as makes most of them travel. ``slots``: how many each rank has. No rank gets two copies of an expert; a
    layer for which every shift would give it stays as it is."""
    of_rank = np.repeat(np.arange(len(slots)), slots)
    if len(of_rank) != placement.shape[1]:
        raise InvalidConfig("slots", list(slots), f"numbers that add up to {placement.shape[1]}")
    return np.stack([_turned_row(row, of_rank) for row in placement])


def _turned_row(row: Row, of_rank: np.ndarray[Any, np.dtype[np.int64]]) -> Row:
    held = set(zip(of_rank.tolist(), row.tolist(), strict=True))
    best, travels = row, 0
    for shift in range(1, len(row)):
        other = np.roll(row, shift)
        gets = set(zip(of_rank.tolist(), other.tolist(), strict=True))
        if len(gets) == len(row) and len(gets - held) > travels:
            best, travels = other, len(gets - held)
    return best


class Shuffling:
    """Moves the experts of ``engine`` between the placement that it has and the one that is :func:`turned` from it.

    ``outcomes``: of all rebalances, how often each; ``refused``: why some could not be asked for.
    """

    def __init__(self, engine: AsyncEngine, home: I32Matrix, away: I32Matrix) -> None:
        self.engine = engine
        self.home = home
        self.away = away
        self.outcomes: Counter[str] = Counter()
        self.refused: list[str] = []
        self._turn = 0

    @classmethod
    async def of(cls, engine: AsyncEngine) -> Shuffling:
        """From the placement that ``engine`` has now; its slots are shared out evenly."""
        home = (await engine.expert_load()).physical_to_logical
        sizes = engine.config.parallel
        ep_size = sizes.data_parallel_size * sizes.tensor_parallel_size
        return cls(engine, home, turned(home, slots_per_rank(home.shape[1], ep_size)))

    async def once(self) -> RebalanceReport:
        """To the other of the two placements."""
        self._turn += 1
        report = await self.engine.rebalance_experts(self.away if self._turn % 2 else self.home)
        self.outcomes[report.outcome] += 1
        return report

    async def on_and_on(self) -> None:
        """Until it is cancelled, over faults too: ranks that are fewer have another number of slots, for which neither
        placement is one."""
        while True:
            try:
                report = await self.once()
            except EngineClosed:
                raise
            except DrumlineError as error:
                self.refused.append(error.text)
                del self.refused[:-KEPT]
                await asyncio.sleep(AFTER_ERROR_S)
            else:
                if report.outcome == "failed":
                    await asyncio.sleep(AFTER_ERROR_S)  # an epoch that is not open fails at once
