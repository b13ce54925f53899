"""Matrix products with a weight that is loaded once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from drumline.workers.layers.packing import pack_weight, packed_linear


class Linear:
    """y = x W^T + b. ``weight`` is (out, in); several projections of the same input stand one below the other."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(n, in) to (n, out)."""
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Take the loaded weight into the layout that multiplies fastest; later changes of ``weight`` are not seen.

        ``weight`` becomes a shape without memory unless someone else still holds it, as a tied embedding does.
        """
        self._packed = pack_weight(self.weight)
        if self._packed is not None:
            self.weight = self.weight.to("meta")
