"""The dense feed-forward network."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from drumline.workers.layers.linear import Linear


class GatedMlp:
    """down(silu(gate(x)) * up(x)). https://arxiv.org/abs/2002.05202

    ``gate_up`` is (2 * intermediate, hidden), the gate's rows first; ``down`` (hidden, intermediate).
    """

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.intermediate_size = down.shape[1]
        self.gate_up = Linear(gate_up)
        self.down = Linear(down)

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.gate_up.pack()
        self.down.pack()

    def __call__(self, x: Tensor) -> Tensor:
        """(n, hidden) to (n, hidden)."""
        return self.down(gated_silu(self.gate_up(x), self.intermediate_size))


def gated_silu(gate_up: Tensor, intermediate_size: int) -> Tensor:
    """silu(gate) * up of (n, 2 * intermediate), the gate's channels first."""
    return F.silu(gate_up[:, :intermediate_size]).mul_(gate_up[:, intermediate_size:])
