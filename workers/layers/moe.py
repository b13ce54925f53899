"""Mixture of experts over ranks.

Every layout runs the same arithmetic: the home rank routes its tokens and picks a physical slot for each (token, k)
pair; the rank that owns the slot computes the pair's expert output; the home rank multiplies the outputs by the routing
weights and adds them up in top-k order, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drumline.workers.layers.linear import Linear
from drumline.workers.layers.mlp import gated_silu


class ExpertExchange(Protocol):
    """How tokens reach the ranks that hold their experts, and how the outputs come home."""

    def dispatch(self, hidden: Tensor, topk_ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Gather the tokens of all replicas.

        ``hidden`` (n, H), ``topk_ids`` int64 (n, K) physical slots of this replica's tokens; ``counts`` the tokens of
        every replica. Returns the same of all N = sum(counts) tokens, in replica order: (N, H) and (N, K).
        """
        ...

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        """Bring expert outputs home.

        ``outputs`` float32 (P, H): what this rank computed, for the pairs ``pair_index`` int64 (P,), ascending, each
        token * K + k over the N tokens of the dispatch before. ``owners`` int64 (n * K,): the ep rank that computes
        each pair of this replica's own tokens. Returns float32 (n * K, H), this replica's pairs in order.
        """
        ...


class LocalExchange:
    """The exchange of a rank that holds all experts: everything is at home already."""

    def dispatch(self, hidden: Tensor, topk_ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return hidden, topk_ids

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        return outputs


@dataclass(slots=True, frozen=True)
class RoutingView:
    """One layer's part of the placement maps, on the device.

    ``slot_of_expert`` int64 (experts,): the physical slot that serves each logical expert. ``owner_of_slot`` int64
    (slots,): its ep rank. This rank owns slots ``first_slot`` to ``end_slot``.
    """

    slot_of_expert: Tensor
    owner_of_slot: Tensor
    first_slot: int
    end_slot: int


class MoeLayer:
    """Router and the local experts of one layer.

    ``router`` is (experts, hidden), ``gate_up`` (local slots, 2 * intermediate, hidden), the gate's rows first, and
    ``down`` (local slots, hidden, intermediate). ``load`` int64 (local slots,) counts the tokens that each slot has
    computed.
    """

    def __init__(
        self,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        routing: RoutingView,
        *,
        top_k: int,
        normalise: bool,
    ):
        self.top_k = top_k
        self.intermediate_size = down.shape[2]
        self.routing = routing
        self.exchange: ExpertExchange = LocalExchange()
        self.router = Linear(router)
        self.gate_up = gate_up
        self.down = down
        # The same memory, transposed for the product: experts that are moved are written in place.
        self._gate_up_of = list(gate_up.transpose(1, 2))
        self._down_of = list(down.transpose(1, 2))
        self.load = torch.zeros(len(down), dtype=torch.int64, device=down.device)
        self._normalise = normalise

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """(n, hidden) to (n, hidden); ``counts``: tokens of every replica. A replica without tokens calls it too."""
        routing, k = self.routing, self.top_k
        weights, experts = self.route(x)
        slots = routing.slot_of_expert[experts]
        all_x, all_slots = self.exchange.dispatch(x, slots, counts)
        outputs, pair_index = self._compute_local(all_x, all_slots.reshape(-1))
        home = self.exchange.combine(outputs, pair_index, routing.owner_of_slot[slots.reshape(-1)])
        pairs = home.view(len(x), k, x.shape[1])
        # An explicit order: a library reduction may group the terms differently from one batch size to another.
        total = pairs[:, 0] * weights[:, 0:1]
        for i in range(1, k):
            total.addcmul_(pairs[:, i], weights[:, i : i + 1])
        return total.to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights float32 (n, K), best first, and logical experts int64 (n, K)."""
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def _compute_local(self, all_x: Tensor, pair_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs float32 (P, hidden) of the pairs whose slot is on this rank, and which pairs (P,), ascending."""
        first, end = self.routing.first_slot, self.routing.end_slot
        if first == 0 and end == len(self.routing.owner_of_slot):
            pair_index = torch.arange(len(pair_slots), device=pair_slots.device)
            local = pair_slots
        else:
            pair_index = ((pair_slots >= first) & (pair_slots < end)).nonzero().view(-1)
            local = pair_slots.index_select(0, pair_index) - first
        # Stable: within an expert the tokens keep their order, however sorting breaks ties.
        order = local.argsort(stable=True)
        counts = torch.bincount(local, minlength=end - first)
        self.load += counts
        rows = all_x.index_select(0, pair_index.index_select(0, order) // self.top_k)
        grouped = self._experts(rows, counts.tolist())
        outputs = torch.empty(grouped.shape, dtype=torch.float32, device=grouped.device)
        outputs.index_copy_(0, order, grouped.float())
        return outputs, pair_index

    def _experts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
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
