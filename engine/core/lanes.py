"""Whose turn it is: under pipeline parallelism each row computes only in the steps of its lane, one lane per stage.

Lanes take turns, so that while one lane's step is in a stage, another's fills the stage before. A row's next token
needs the last one, so rows of one lane alone keep one stage busy at a time: new rows are shared out evenly.
"""

from __future__ import annotations

from collections.abc import Sequence


class LaneTurns:
    """The order in which lanes are asked for the next step. One that has nothing to compute is passed over."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._next = 0

    def order(self) -> list[int]:
        """Every lane, the one whose turn it is first."""
        return [(self._next + i) % self._lanes for i in range(self._lanes)]

    def took(self, lane: int) -> None:
        """``lane`` got the step; the one after it is next."""
        self._next = (lane + 1) % self._lanes


def share_of_lane(rows: Sequence[int], lane: int, coming: int) -> int:
    """How many of ``coming`` sequences are for ``lane``, when each in turn goes to the lane with fewest rows, ties to
    ``lane``. ``rows``: what each lane has."""
    if coming < 1:
        return 0
    ascending = sorted(rows)
    # The emptiest lanes take all that come and reach one level, some of them one row less.
    level = filled = 0
    for used, own in enumerate(ascending, 1):
        filled += own
        level = -(-(coming + filled) // used)
        if used < len(ascending) and level <= ascending[used]:
            break
    return max(level - rows[lane], 0)
