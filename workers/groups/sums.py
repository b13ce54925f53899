"""Sums over ranks whose bits do not depend on who computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)


def add_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """``out = parts[0] + parts[1] + ...``, added from left to right; all of one shape and dtype.

    Floats of 16 bits are added in float32 and rounded once.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
    elif out.dtype in _NARROW:
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
    else:
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)


def even_counts(total: int, size: int) -> list[int]:
    """``total`` cut into ``size`` counts that differ by one at most, the larger ones first."""
    share, more = divmod(total, size)
    return [share + (position < more) for position in range(size)]
