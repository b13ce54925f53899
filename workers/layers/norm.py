"""Root mean square normalisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. https://arxiv.org/abs/1910.07467

    ``weight`` is (size,).
    """

    def __init__(self, weight: Tensor, eps: float):
        self.weight = weight
        self._shape = tuple(weight.shape)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        return F.rms_norm(x, self._shape, self.weight, self._eps)
