"""Token embedding, and the output projection that may share its weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class Embedding:
    """``weight`` is (vocabulary, hidden)."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 (n,) to (n, hidden)."""
        return F.embedding(token_ids, self.weight)
