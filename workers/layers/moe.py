"""Mixture of experts over ranks.

With whole experts on each rank every layout runs the same arithmetic: the home rank of a token routes it and picks a
physical slot for each (token, k) pair; the rank that owns the slot computes the pair; the home rank multiplies the
outputs by the routing weights and adds them up in top-k order, in float32. The ranks of an attention replica, which
hold the same tokens, share them out: each is home to its share.

Without expert parallel each rank has some channels of every expert: it computes partial outputs of all tokens, weighs
and adds them in top-k order, and the partial sums are added in rank order, in float32, on their way home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drumline.protocol.placement import PlacementMaps
from drumline.workers.collectives import Group
from drumline.workers.layers.expert_maps import ExpertMaps
from drumline.workers.layers.experts import LocalExperts, sum_top_k
from drumline.workers.layers.parallel import ModelGroups, ParallelMlp, gather_shares
from drumline.workers.layers.replica_choice import ReplicaChoice
from drumline.workers.layers.routing import Gate
from drumline.workers.step_tokens import StepTokens


class ExpertExchange(Protocol):
    """How tokens reach the ranks that hold their experts, and how the outputs come home."""

    def dispatch(self, hidden: Tensor, slots: Tensor, owners: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Bring tokens to where their experts are.

        ``hidden`` (n, H), ``slots`` int64 (n, K) physical slots of this rank's tokens, ``owners`` int64 (n * K,) the
        ep rank that owns each; ``counts`` the tokens of every rank. Returns the (N, H) and (N, K) of all tokens that
        this rank may have to compute, of all ranks in rank order; slots among them that it does not own are others'.
        """
        ...

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        """Bring expert outputs home.

        ``outputs`` float32 (P, H): what this rank computed, for the pairs ``pair_index`` int64 (P,), ascending, each
        token * K + k over the N tokens of the dispatch before. ``owners`` as in that dispatch. Returns float32
        (n * K, H), this rank's pairs in order.
        """
        ...


class LocalExchange:
    """The exchange of a rank that holds all experts: everything is at home already."""

    def dispatch(self, hidden: Tensor, slots: Tensor, owners: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return hidden, slots

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        return outputs


@dataclass(slots=True, frozen=True)
class RoutingView:
    """One layer's part of the placement maps, on the device.

    ``slot_of_expert`` int64 (experts,): the physical slot that serves each logical expert. ``owner_of_slot`` int64
    (slots,): its ep rank. This rank owns slots ``first_slot`` to ``end_slot``. ``replicas``: the choice where experts
    have several copies; ``maps``: what to route by instead of both.
    """

    slot_of_expert: Tensor
    owner_of_slot: Tensor
    first_slot: int
    end_slot: int
    replicas: ReplicaChoice | None = None
    maps: ExpertMaps | None = None

    @classmethod
    def nowhere(cls, device: torch.device) -> RoutingView:
        """That of a layer that belongs to no epoch."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(nothing, nothing, 0, 0)

    @classmethod
    def of(
        cls, maps: PlacementMaps, moe_layer: int, ep_rank: int, device: torch.device, nodes: Sequence[int] = ()
    ) -> RoutingView:
        """The part of MoE layer number ``moe_layer``, as rank ``ep_rank`` sees it. ``nodes`` as in ReplicaChoice."""
        slots = maps.local_slots(ep_rank)
        return cls(
            slot_of_expert=torch.tensor(maps.logical_to_physical[moe_layer, :, 0].tolist(), device=device),
            owner_of_slot=torch.tensor(maps.slot_rank.tolist(), device=device),
            first_slot=slots.start,
            end_slot=slots.stop,
            replicas=ReplicaChoice.of(maps, moe_layer, ep_rank, nodes, device),
        )

    def choose(self, experts: Tensor, step: int) -> Tensor:
        """The physical slot, int64 (n, K), of each of the logical ``experts`` int64 (n, K) of this rank's tokens."""
        if self.maps is not None:
            return self.maps.slots_of(experts)
        return self.slot_of_expert[experts] if self.replicas is None else self.replicas.slots_of(experts, step)

    @property
    def all_here(self) -> bool:
        """Whether this rank owns every slot."""
        return self.first_slot == 0 and self.end_slot == len(self.owner_of_slot)


class MoeLayer:
    """Gate and local experts of one layer, ``shared`` experts that compute every token, if there are any.

    ``sharded``: each rank has channels of every expert, not whole experts. What changes from epoch to epoch is
    replaced: ``experts``, ``routing``, ``exchange`` and ``sharded``.
    """

    def __init__(
        self,
        gate: Gate,
        experts: LocalExperts,
        routing: RoutingView,
        groups: ModelGroups,
        shared: ParallelMlp | None,
        *,
        sharded: bool,
    ):
        self.gate = gate
        self.experts = experts
        self.routing = routing
        self.shared = shared
        self.exchange: ExpertExchange = LocalExchange()
        self._groups = groups
        self.sharded = sharded

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        if self.shared is not None:
            self.shared.pack()

    def __call__(self, x: Tensor, tokens: StepTokens) -> Tensor:
        """(own tokens, hidden) to the same. A replica without tokens calls it too."""
        routed = self._sharded_experts(x, tokens) if self.sharded else self._whole_experts(x, tokens)
        return routed if self.shared is None else routed + self.shared(x, tokens)

    def _whole_experts(self, x: Tensor, tokens: StepTokens) -> Tensor:
        mine = x[tokens.share[0] : tokens.share[1]]
        weights, experts = self.gate(mine)
        slots = self.routing.choose(experts, tokens.step)
        owners = self.routing.owner_of_slot[slots.reshape(-1)]
        all_x, all_slots = self.exchange.dispatch(mine, slots, owners, tokens.by_rank)
        outputs, pair_index = self._compute_local(all_x, all_slots)
        home = self.exchange.combine(outputs, pair_index, owners)
        total = sum_top_k(home.view(*slots.shape, x.shape[1]), weights).to(x.dtype)
        return gather_shares(total, tokens, self._groups.attn_tp)

    def _compute_local(self, all_x: Tensor, all_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs float32 (P, hidden) of the pairs whose slot is on this rank, and which pairs (P,), ascending."""
        routing, pair_slots, top_k = self.routing, all_slots.reshape(-1), all_slots.shape[1]
        if routing.all_here:
            pair_index = torch.arange(len(pair_slots), device=pair_slots.device)
            local = pair_slots
        else:
            pair_index = ((pair_slots >= routing.first_slot) & (pair_slots < routing.end_slot)).nonzero().view(-1)
            local = pair_slots.index_select(0, pair_index) - routing.first_slot
        return self.experts(all_x, pair_index // top_k, local), pair_index

    def _sharded_experts(self, x: Tensor, tokens: StepTokens) -> Tensor:
        group = self._groups.experts
        if len(tokens.counts) == 1:
            # All ranks hold all tokens already, and route them alike.
            if not len(x):
                return x
            return group.all_reduce(self._partial(x, *self.gate(x))).to(x.dtype)
        mine = x[tokens.share[0] : tokens.share[1]]
        weights, experts = self.gate(mine)
        all_x, all_weights, all_experts = gather_routed(group, mine, weights, experts, tokens.by_rank)
        own = group.reduce_scatter_rows(self._partial(all_x, all_weights, all_experts), tokens.by_rank)
        return gather_shares(own.to(x.dtype), tokens, self._groups.attn_tp)

    def _partial(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """What this rank's channels add to the outputs of ``x``: float32 (n, hidden)."""
        slots = self.routing.slot_of_expert[experts].reshape(-1)
        pairs = torch.arange(len(slots), device=slots.device)
        outputs = self.experts(x, pairs // weights.shape[1], slots)
        return sum_top_k(outputs.view(*weights.shape, x.shape[1]), weights)


def gather_routed(
    group: Group, x: Tensor, weights: Tensor, experts: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' tokens with their routing, in one collective: hidden states, weights and ids travel as bytes."""
    parts = [x.contiguous(), weights.contiguous(), experts.to(torch.int32)]
    packed = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    gathered = group.all_gather_rows(packed, counts)
    width, ids = x.shape[1] * x.itemsize, weights.shape[1] * weights.itemsize
    hidden = gathered[:, :width].contiguous().view(x.dtype)
    routed = gathered[:, width:].contiguous()
    return (
        hidden,
        routed[:, :ids].contiguous().view(weights.dtype),
        routed[:, ids:].contiguous().view(torch.int32).long(),
    )
