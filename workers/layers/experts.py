"""The experts that one rank computes, whole ones or its channels of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.workers.layers.mlp import gated_silu


class LocalExperts:
    """``gate_up`` (slots, 2 * intermediate, hidden), the gate's rows first, and ``down`` (slots, hidden, intermediate).

    A slot computes with its own row of both, or with other memory that it was told to :meth:`use`. ``load`` int64
    (slots,) counts the tokens that each slot has computed.
    """

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.intermediate_size = down.shape[2]
        self.gate_up = gate_up
        self.down = down
        self._used = list(zip(gate_up, down, strict=True))
        # The same memory, transposed for the product: experts that are moved are written in place.
        self._gate_up_of = list(gate_up.transpose(1, 2))
        self._down_of = list(down.transpose(1, 2))
        self.load = torch.zeros(len(down), dtype=torch.int64, device=down.device)

    def used(self, slot: int) -> tuple[Tensor, Tensor]:
        """The memory that the slot computes with: (2 * intermediate, hidden) and (hidden, intermediate)."""
        return self._used[slot]

    def use(self, slot: int, gate_up: Tensor, down: Tensor) -> None:
        """Compute ``slot`` with this memory from now on."""
        self._used[slot] = gate_up, down
        self._gate_up_of[slot], self._down_of[slot] = gate_up.t(), down.t()

    def __call__(self, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        """Outputs float32 (P, hidden) of P pairs: row ``tokens[p]`` of ``x`` in local slot ``slots[p]``, both int64."""
        # Stable: within an expert the tokens keep their order, however sorting breaks ties.
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots, minlength=len(self.down))
        self.load += counts
        grouped = self._grouped(x.index_select(0, tokens.index_select(0, order)), counts.tolist())
        outputs = torch.empty(grouped.shape, dtype=torch.float32, device=grouped.device)
        return outputs.index_copy_(0, order, grouped.float())

    def _grouped(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows grouped by local slot, (P, hidden) to (P, hidden): one pair of products per expert with tokens."""
        gate_up = rows.new_empty(len(rows), 2 * self.intermediate_size)
        used = [slot for slot, count in enumerate(counts) if count]
        sizes = [counts[slot] for slot in used]
        # Views are made in bulk: one by one they would cost as much as the products of a few tokens.
        for slot, x, out in zip(used, rows.split_with_sizes(sizes), gate_up.split_with_sizes(sizes), strict=True):
            torch.mm(x, self._gate_up_of[slot], out=out)
        inner = gated_silu(gate_up, self.intermediate_size)
        total = torch.empty_like(rows)
        for slot, x, out in zip(used, inner.split_with_sizes(sizes), total.split_with_sizes(sizes), strict=True):
            torch.mm(x, self._down_of[slot], out=out)
        return total


def sum_top_k(pairs: Tensor, weights: Tensor) -> Tensor:
    """float32 (n, K, hidden) outputs times (n, K) weights, added up in top-k order: float32 (n, hidden).

    An explicit order: a library reduction may group the terms differently from one batch size to another.
    """
    total = pairs[:, 0] * weights[:, 0:1]
    for k in range(1, weights.shape[1]):
        total.addcmul_(pairs[:, k], weights[:, k : k + 1])
    return total
