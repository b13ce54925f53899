"""Which decoding rows are gathered together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.workers.attention_plan import decode_groups


@pytest.mark.parametrize(
    ("widths", "max_blocks", "groups"),
    [
        ([3], 100, [(0, 1, 3)]),
        ([3, 3, 3], 100, [(0, 3, 3)]),
        # Near each other: not worth sorting, in any order.
        ([5, 3, 4], 100, [(0, 3, 5)]),
        # A long one does not make the short ones long.
        ([1, 2, 2, 60], 1000, [(0, 3, 2), (3, 4, 60)]),
        # What does not fit the gather goes into the next.
        ([10, 10, 10, 10, 10], 20, [(0, 2, 10), (2, 4, 10), (4, 5, 10)]),
        # A row that alone is too much is gathered alone.
        ([50, 60], 20, [(0, 1, 50), (1, 2, 60)]),
        # Lengths that hardly differ are not sorted, though rounded up to blocks they may just miss one run.
        ([31, 31, 31, 20, 31], 32, [(0, 1, 31), (1, 2, 31), (2, 3, 31), (3, 4, 20), (4, 5, 31)]),
    ],
)
def test_rows_of_similar_length_are_gathered_together(
    widths: list[int], max_blocks: int, groups: list[tuple[int, int, int]]
) -> None:
    assert decode_groups(np.array(widths), max_blocks) == groups


@given(st.lists(st.integers(1, 300), min_size=1, max_size=100), st.integers(1, 2000))
def test_groups_cover_every_row_once_within_their_limits(widths: list[int], max_blocks: int) -> None:
    rows = np.array(widths)
    groups = decode_groups(rows, max_blocks)
    assert [start for start, _, _ in groups] == [0] + [end for _, end, _ in groups[:-1]]
    assert groups[-1][1] == len(widths)
    for start, end, widest in groups:
        assert widest == rows[start:end].max()
        assert widest <= max(rows[start] * 1.5, rows[start] + 4)
        assert end - start == 1 or (end - start) * widest <= max_blocks
