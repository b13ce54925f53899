"""Sums over ranks."""

from __future__ import annotations

import torch

from drumline.workers.groups.sums import add_in_order, even_counts


def test_floats_are_added_from_left_to_right() -> None:
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]
    out = torch.empty(1)
    add_in_order(parts, out)
    assert out.item() == 0.0  # 1e8 + 1 is 1e8 in float32
    add_in_order([parts[0], parts[2], parts[1]], out)
    assert out.item() == 1.0


def test_bfloat16_is_rounded_once() -> None:
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    out = torch.empty(1, dtype=torch.bfloat16)
    add_in_order(parts, out)
    assert out.item() == 258.0  # 256 + 1 is 256 in bfloat16, so rounding twice would leave 256


def test_one_part_is_copied() -> None:
    out = torch.empty(2, dtype=torch.int64)
    add_in_order([torch.tensor([3, 4])], out)
    assert out.tolist() == [3, 4]


def test_even_counts_differ_by_one_at_most() -> None:
    assert even_counts(10, 4) == [3, 3, 2, 2]
    assert even_counts(2, 3) == [1, 1, 0]
    assert even_counts(0, 2) == [0, 0]
