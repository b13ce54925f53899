"""A model under construction for one rank: memory for its pieces, and which tensor of the checkpoint fills each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.protocol.shards import RankShards, rank_shards, split
from drumline.protocol.weights import EXPERT, ModelWeights
from drumline.workers.layers import ModelGroups, RoutingView
from drumline.workers.loading import LoadPlan

_DTYPES = {"float32": torch.float32}


@dataclass(slots=True)
class ModelBuild:
    """What of ``spec`` the rank holds. ``maps`` is the placement of the experts (0 layers when dense)."""

    spec: ModelSpec
    layout: Layout
    rank: int
    maps: PlacementMaps
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    shards: RankShards = field(init=False)
    weights: ModelWeights = field(init=False)
    plan: LoadPlan = field(init=False)
    groups: ModelGroups = field(init=False)

    def __post_init__(self) -> None:
        self.shards = rank_shards(self.layout, self.spec, self.rank)
        self.weights = ModelWeights(self.spec)
        self.plan = LoadPlan(self.weights)
        self.groups = ModelGroups()

    def empty(self, *shape: int) -> Tensor:
        """Memory for a weight in the model's dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of this rank's piece of weight ``name``."""
        return self.weights.piece(name, self.shards).shape

    def has(self, name: str) -> bool:
        """Whether the model has a weight ``name``."""
        return name in self.weights.by_name

    def load(self, name: str) -> Tensor:
        """Memory for this rank's piece of weight ``name``, to be filled from the checkpoint."""
        piece = self.weights.piece(name, self.shards)
        target = torch.empty(piece.shape, dtype=_DTYPES.get(piece.weight.dtype, self.dtype), device=self.device)
        self.fill(name, target)
        return target

    def load_if(self, name: str) -> Tensor | None:
        """As :meth:`load`; None when the model has no such weight."""
        return self.load(name) if self.has(name) else None

    def load_rows(self, *names: str) -> Tensor:
        """The pieces of several weights one below the other: one product computes them all."""
        shapes = [self.shape(name) for name in names]
        whole = self.empty(sum(shape[0] for shape in shapes), *shapes[0][1:])
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            self.fill(name, whole[start : start + shape[0]])
            start += shape[0]
        return whole

    def fill(self, name: str, target: Tensor, expert: int | None = None) -> None:
        """Fill ``target`` with this rank's piece of weight ``name`` (of ``expert``, where each has one)."""
        piece = self.weights.piece(name, self.shards)
        self.plan.add(name if expert is None else name.replace(EXPERT, str(expert)), target, piece)

    @property
    def vocab_widths(self) -> list[int]:
        """Vocabulary entries of every rank of the attention replica."""
        parts = self.layout.attn_tp_size
        spans = [split(self.spec.vocab_size, parts, part) for part in range(parts)]
        return [end - start for start, end in spans]

    def routing(self, moe_layer: int) -> RoutingView:
        """The view that MoE layer number ``moe_layer`` (counted among MoE layers) reads."""
        slots = self.maps.local_slots(self.shards.ep_rank)
        return RoutingView(
            slot_of_expert=torch.tensor(self.maps.logical_to_physical[moe_layer, :, 0].tolist(), device=self.device),
            owner_of_slot=torch.tensor(self.maps.slot_rank.tolist(), device=self.device),
            first_slot=slots.start,
            end_slot=slots.stop,
        )

    def local_experts(self, moe_layer: int) -> list[int]:
        """The logical expert of each slot of this rank, in slot order."""
        slots = self.maps.local_slots(self.shards.ep_rank)
        return [int(expert) for expert in self.maps.physical_to_logical[moe_layer, slots.start : slots.stop]]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.shards.kv_heads[1] - self.shards.kv_heads[0]

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self.shards.q_heads[1] - self.shards.q_heads[0]
