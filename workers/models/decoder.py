"""The decoder that all supported models are variants of: norm, attention, norm, feed-forward, residuals between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.workers.layers import (
    AttentionInputs,
    Embedding,
    ExpertExchange,
    GatedMlp,
    Linear,
    MoeLayer,
    PagedAttention,
    RmsNorm,
    RotaryEmbedding,
    RoutingView,
)
from drumline.workers.loading import LoadPlan

Mlp: TypeAlias = GatedMlp | MoeLayer


@dataclass(slots=True, frozen=True)
class ModelPlacement:
    """What of a model this rank holds, and where. ``maps`` is the placement of the experts (0 layers when dense)."""

    maps: PlacementMaps
    ep_rank: int
    max_model_len: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        """A weight to be loaded."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def routing(self, moe_layer: int) -> RoutingView:
        """The view that MoE layer number ``moe_layer`` (counted among MoE layers) reads."""
        slots = self.maps.local_slots(self.ep_rank)
        return RoutingView(
            slot_of_expert=torch.tensor(self.maps.logical_to_physical[moe_layer, :, 0].tolist(), device=self.device),
            owner_of_slot=torch.tensor(self.maps.slot_rank.tolist(), device=self.device),
            first_slot=slots.start,
            end_slot=slots.stop,
        )

    def local_experts(self, moe_layer: int) -> list[int]:
        """The logical expert of each slot of this rank, in slot order."""
        slots = self.maps.local_slots(self.ep_rank)
        return [int(expert) for expert in self.maps.physical_to_logical[moe_layer, slots.start : slots.stop]]


@dataclass(slots=True, frozen=True)
class StepContext:
    """What the layers of one step share.

    ``positions`` int64 (n,); ``counts``: tokens of every replica of the lockstep group, this one's n among them;
    ``keys`` and ``values``: the cache, by layer (kv heads, blocks, block size, head dim).
    """

    positions: Tensor
    attention: AttentionInputs
    counts: Sequence[int]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


MlpBuilder: TypeAlias = Callable[[ModelSpec, ModelPlacement, int, LoadPlan], Mlp]


def dense_mlp(spec: ModelSpec, placement: ModelPlacement, layer: int, plan: LoadPlan) -> GatedMlp:
    """The dense feed-forward network of ``layer``."""
    width, hidden = spec.intermediate_size, spec.hidden_size
    mlp = GatedMlp(placement.empty(2 * width, hidden), placement.empty(hidden, width))
    prefix = f"model.layers.{layer}.mlp"
    plan.add(f"{prefix}.gate_proj.weight", mlp.gate_up.weight[:width])
    plan.add(f"{prefix}.up_proj.weight", mlp.gate_up.weight[width:])
    plan.add(f"{prefix}.down_proj.weight", mlp.down.weight)
    return mlp


class SelfAttention:
    """Projections, per-head norms, rotation and attention of one layer."""

    def __init__(self, spec: ModelSpec, placement: ModelPlacement, layer: int, plan: LoadPlan, *, qk_norm: bool):
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        hidden, wide = spec.hidden_size, (heads + 2 * kv_heads) * dim
        self.heads, self.kv_heads, self.dim, self.eps = heads, kv_heads, dim, spec.rms_norm_eps
        self.qkv = Linear(placement.empty(wide, hidden), placement.empty(wide) if spec.attention_bias else None)
        self.out = Linear(
            placement.empty(hidden, heads * dim), placement.empty(hidden) if spec.attention_bias else None
        )
        self.attention = PagedAttention(heads, kv_heads, dim)
        prefix = f"model.layers.{layer}.self_attn"
        start = 0
        for name, rows in (("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim)):
            plan.add(f"{prefix}.{name}.weight", self.qkv.weight[start : start + rows])
            if self.qkv.bias is not None:
                plan.add(f"{prefix}.{name}.bias", self.qkv.bias[start : start + rows])
            start += rows
        plan.add(f"{prefix}.o_proj.weight", self.out.weight)
        if self.out.bias is not None:
            plan.add(f"{prefix}.o_proj.bias", self.out.bias)
        # One weight row per head: queries and keys are normalised together.
        self.head_norm = placement.empty(heads + kv_heads, dim) if qk_norm else None
        if self.head_norm is not None:
            plan.add(f"{prefix}.q_norm.weight", self.head_norm[:heads])
            plan.add(f"{prefix}.k_norm.weight", self.head_norm[heads:])

    def __call__(
        self, x: Tensor, layer: int, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor], step: StepContext
    ) -> Tensor:
        """(n, hidden) to (n, hidden); ``tables`` are those of the step's positions."""
        fused = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.dim)
        qk, v = fused[:, : self.heads + self.kv_heads], fused[:, self.heads + self.kv_heads :]
        if self.head_norm is not None:
            qk = F.rms_norm(qk, (self.dim,), None, self.eps) * self.head_norm
        qk = rotary.rotate(qk, tables)
        attended = self.attention(
            qk[:, : self.heads], qk[:, self.heads :], v, step.keys[layer], step.values[layer], step.attention
        )
        return self.out(attended)


class DecoderLayer:
    """One layer: attention and feed-forward, each behind a norm and added to its input."""

    def __init__(
        self, spec: ModelSpec, placement: ModelPlacement, layer: int, plan: LoadPlan, *, qk_norm: bool, mlp: MlpBuilder
    ):
        self.index = layer
        self.input_norm = RmsNorm(placement.empty(spec.hidden_size), spec.rms_norm_eps)
        self.post_norm = RmsNorm(placement.empty(spec.hidden_size), spec.rms_norm_eps)
        plan.add(f"model.layers.{layer}.input_layernorm.weight", self.input_norm.weight)
        plan.add(f"model.layers.{layer}.post_attention_layernorm.weight", self.post_norm.weight)
        self.attention = SelfAttention(spec, placement, layer, plan, qk_norm=qk_norm)
        self.mlp = mlp(spec, placement, layer, plan)

    def __call__(self, x: Tensor, rotary: RotaryEmbedding, tables: tuple[Tensor, Tensor], step: StepContext) -> Tensor:
        x = x + self.attention(self.input_norm(x), self.index, rotary, tables, step)
        inner = self.post_norm(x)
        return x + (self.mlp(inner, step.counts) if isinstance(self.mlp, MoeLayer) else self.mlp(inner))


class Decoder:
    """A causal language model. ``plan`` says which tensor of the checkpoint fills which weight."""

    def __init__(self, spec: ModelSpec, placement: ModelPlacement, *, qk_norm: bool, mlp: MlpBuilder):
        self.spec = spec
        self.plan = LoadPlan()
        self.embedding = Embedding(placement.empty(spec.vocab_size, spec.hidden_size))
        self.plan.add("model.embed_tokens.weight", self.embedding.weight)
        self.layers = [
            DecoderLayer(spec, placement, layer, self.plan, qk_norm=qk_norm, mlp=mlp)
            for layer in range(spec.num_layers)
        ]
        self.norm = RmsNorm(placement.empty(spec.hidden_size), spec.rms_norm_eps)
        self.plan.add("model.norm.weight", self.norm.weight)
        if spec.tie_word_embeddings:
            self.head = Linear(self.embedding.weight)
            self.plan.leave("lm_head.weight")
        else:
            self.head = Linear(placement.empty(spec.vocab_size, spec.hidden_size))
            self.plan.add("lm_head.weight", self.head.weight)
        self.rotary = RotaryEmbedding(
            spec.head_dim, spec.rope_theta, spec.rope_scaling, placement.max_model_len, placement.device
        )
        self.moe_layers = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeLayer)]

    def finish_loading(self) -> None:
        """The weights are in place: lay them out for use and let go of the plan's views of them."""
        self.plan = LoadPlan()
        for layer in self.layers:
            layer.attention.qkv.pack()
            layer.attention.out.pack()
            if isinstance(layer.mlp, GatedMlp):
                layer.mlp.pack()
        self.head.pack()

    def set_exchange(self, exchange: ExpertExchange) -> None:
        """Use ``exchange`` in every MoE layer from the next step on."""
        for moe in self.moe_layers:
            moe.exchange = exchange

    def hidden(self, token_ids: Tensor, step: StepContext) -> Tensor:
        """Last hidden states (n, hidden), normalised, of int64 ``token_ids`` (n,)."""
        tables = self.rotary.at(step.positions)
        x = self.embedding(token_ids)
        for layer in self.layers:
            x = layer(x, self.rotary, tables, step)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to float32 (n, vocabulary)."""
        return self.head(hidden).float()

    def dummy_step(self, counts: Sequence[int]) -> None:
        """Compute no token of this replica, but meet the other replicas in every MoE layer."""
        nothing = self.embedding.weight[:0]
        for moe in self.moe_layers:
            moe(nothing, counts)
