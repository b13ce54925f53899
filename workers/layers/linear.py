"""Matrix products with a weight that is loaded once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class Linear:
    """y = x W^T + b. ``weight`` is (out, in); several projections of the same input stand one below the other."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)
