"""A model under construction for one rank: memory for its pieces, and which tensor of the checkpoint fills each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32Matrix
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import RankShards, rank_shards, split
from drumline.protocol.weights import ModelWeights
from drumline.workers.layers import ModelGroups
from drumline.workers.loading import LoadPlan

_DTYPES = {"float32": torch.float32}


@dataclass(slots=True)
class ModelBuild:
    """What of ``spec`` the rank holds. ``experts``: int32 (MoE layers, slots), the expert of each of its own slots, or
    (0, 0) for all experts of every layer."""

    spec: ModelSpec
    layout: Layout
    rank: int
    experts: I32Matrix
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

    def fill(self, name: str, target: Tensor) -> None:
        """Fill ``target`` with this rank's piece of weight ``name``."""
        self.plan.add(name, target, self.weights.piece(name, self.shards))

    @property
    def vocab_widths(self) -> list[int]:
        """Vocabulary entries of every rank of the attention replica."""
        parts = self.layout.attn_tp_size
        spans = [split(self.spec.vocab_size, parts, part) for part in range(parts)]
        return [end - start for start, end in spans]

    def local_experts(self, moe_layer: int) -> list[int]:
        """The logical expert of each slot of this rank in MoE layer number ``moe_layer``, in slot order."""
        if not len(self.experts):
            return list(range(self.spec.num_experts))
        return [int(expert) for expert in self.experts[moe_layer]]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.shards.kv_heads[1] - self.shards.kv_heads[0]

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self.shards.q_heads[1] - self.shards.q_heads[0]
