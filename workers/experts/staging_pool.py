"""Memory beside the slots, where experts wait for the step that commits them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from drumline.workers.experts.expert_layer import EMPTY, ExpertLayer, ExpertWeights


class StagingPool:
    """``size`` buffers, each for one expert of any layer, all layers being alike. ``canary``: int64 (size,), what came
    with the expert in each; it says nothing of a buffer that is free."""

    def __init__(self, size: int, like: ExpertLayer) -> None:
        experts = like.moe.experts
        # Written, because the system hands memory out as it is used: it must be gone when the KV cache is sized.
        self._gate_up = torch.zeros_like(experts.gate_up[:1]).repeat(size, 1, 1)
        self._down = torch.zeros_like(experts.down[:1]).repeat(size, 1, 1)
        self.canary = np.full(size, EMPTY, dtype=np.int64)

    @classmethod
    def for_layers(cls, layers: Sequence[ExpertLayer]) -> StagingPool | None:
        """One buffer for each slot of the largest layer; None without layers."""
        return cls(max(layer.num_slots for layer in layers), layers[0]) if layers else None

    @property
    def size(self) -> int:
        """How many buffers there are."""
        return len(self._down)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self._gate_up.nbytes + self._down.nbytes

    def buffer(self, number: int) -> ExpertWeights:
        """The memory of one."""
        return self._gate_up[number], self._down[number]
