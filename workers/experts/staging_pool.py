"""Memory beside the slots, where experts wait for the step that commits them."""

from __future__ import annotations

import numpy as np
import torch

from drumline.workers.experts.expert_layer import EMPTY, ExpertLayer, ExpertWeights


class StagingPool:
    """``size`` buffers, each for one expert of any layer, all layers being alike. ``canary``: int64 (size,)."""

    def __init__(self, size: int, like: ExpertLayer) -> None:
        experts = like.moe.experts
        self._gate_up = torch.empty(
            size, *experts.gate_up.shape[1:], dtype=experts.gate_up.dtype, device=experts.gate_up.device
        )
        self._down = torch.empty(size, *experts.down.shape[1:], dtype=experts.down.dtype, device=experts.down.device)
        self.canary = np.full(size, EMPTY, dtype=np.int64)

    @classmethod
    def for_layers(cls, layers: tuple[ExpertLayer, ...]) -> StagingPool | None:
        """One buffer for each slot of the largest layer; None without layers."""
        return cls(max(layer.num_slots for layer in layers), layers[0]) if layers else None

    def fit(self, size: int) -> None:
        """Have ``size`` buffers, all of them free. Those there were may be given up."""
        if size == self.size:
            return
        self._gate_up = self._gate_up.new_empty(size, *self._gate_up.shape[1:])
        self._down = self._down.new_empty(size, *self._down.shape[1:])
        self.canary = np.full(size, EMPTY, dtype=np.int64)

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
