"""The attention block of a layer, with heads cut over the ranks of its attention replica."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.modelspec import MlaSpec
from drumline.workers.layers import Linear, PagedAttention, RmsNorm, RotaryEmbedding, RowParallelLinear
from drumline.workers.models.build import ModelBuild
from drumline.workers.models.context import RotaryTables, StepContext

LATENT_NORM_EPS = 1e-6
"""DeepSeek's norms of compressed queries and keys have this one, whatever ``rms_norm_eps`` says."""


class SelfAttention:
    """Projections, per-head norms, rotation and attention of one layer; heads of queries, keys and values."""

    def __init__(self, build: ModelBuild, layer: int):
        spec, prefix = build.spec, f"model.layers.{layer}.self_attn"
        self.heads, self.kv_heads, self.dim, self.eps = (
            build.num_heads,
            build.num_kv_heads,
            spec.head_dim,
            spec.rms_norm_eps,
        )
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        bias = build.load_rows(*(f"{name}.bias" for name in names)) if spec.attention_bias else None
        self.qkv = Linear(build.load_rows(*(f"{name}.weight" for name in names)), bias)
        out_bias = build.load_if(f"{prefix}.o_proj.bias")
        self.out = RowParallelLinear(build.load(f"{prefix}.o_proj.weight"), out_bias, build.groups)
        scale = spec.softmax_scale or self.dim**-0.5
        self.attention = PagedAttention(self.heads, self.kv_heads, self.dim, self.dim, scale)
        # One weight row per head: queries and keys are normalised together.
        self.head_norm = build.empty(self.heads + self.kv_heads, self.dim) if spec.qk_norm else None
        if self.head_norm is not None:
            build.fill(f"{prefix}.q_norm.weight", self.head_norm[: self.heads])
            build.fill(f"{prefix}.k_norm.weight", self.head_norm[self.heads :])

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.qkv.pack()
        self.out.pack()

    def __call__(
        self, x: Tensor, place: int, rotary: RotaryEmbedding, tables: RotaryTables, step: StepContext
    ) -> Tensor:
        """(n, hidden) to (n, hidden); ``place``: of the layer in its stage; ``tables``: of the step's positions."""
        fused = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.dim)
        qk, v = fused[:, : self.heads + self.kv_heads], fused[:, self.heads + self.kv_heads :]
        if self.head_norm is not None:
            qk = F.rms_norm(qk, (self.dim,), None, self.eps) * self.head_norm
        qk = rotary.rotate(qk, tables)
        attended = self.attention(
            qk[:, : self.heads], qk[:, self.heads :], v, step.keys[place], step.values[place], step.attention
        )
        return self.out(attended)


class LatentAttention:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1).

    The cache holds, for all heads, one latent of ``kv_lora_rank`` channels and one rotated key of ``qk_rope_head_dim``.
    Keys and values of the heads are never made: what would make them is applied to queries and outputs instead, so
    that attention is that of many query heads over one key, whose first channels are the value.
    """

    def __init__(self, build: ModelBuild, layer: int, mla: MlaSpec):
        spec, prefix = build.spec, f"model.layers.{layer}.self_attn"
        self.heads, self.mla = build.num_heads, mla
        compressed = bool(mla.q_lora_rank)
        query = f"{prefix}.q_b_proj.weight" if compressed else f"{prefix}.q_proj.weight"
        self.query = Linear(build.load(query))
        self.query_norm = RmsNorm(build.load(f"{prefix}.q_a_layernorm.weight"), LATENT_NORM_EPS) if compressed else None
        names = ([f"{prefix}.q_a_proj"] if compressed else []) + [f"{prefix}.kv_a_proj_with_mqa"]
        bias = build.load_rows(*(f"{name}.bias" for name in names)) if spec.attention_bias else None
        self.down = Linear(build.load_rows(*(f"{name}.weight" for name in names)), bias)
        self.latent_norm = RmsNorm(build.load(f"{prefix}.kv_a_layernorm.weight"), LATENT_NORM_EPS)
        # Per head: rows that make a key of the latent, then rows that make a value.
        self.up = build.load(f"{prefix}.kv_b_proj.weight")
        out_bias = build.load_if(f"{prefix}.o_proj.bias")
        self.out = RowParallelLinear(build.load(f"{prefix}.o_proj.weight"), out_bias, build.groups)
        width = mla.kv_lora_rank + mla.qk_rope_head_dim
        scale = spec.softmax_scale or spec.head_dim**-0.5
        self.attention = PagedAttention(self.heads, 1, width, mla.kv_lora_rank, scale)

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.query.pack()
        self.down.pack()
        self.out.pack()

    def __call__(
        self, x: Tensor, place: int, rotary: RotaryEmbedding, tables: RotaryTables, step: StepContext
    ) -> Tensor:
        """(n, hidden) to (n, hidden); ``place``: of the layer in its stage; ``tables``: of the step's positions."""
        mla, n = self.mla, len(x)
        down = self.down(x)
        rank = mla.kv_lora_rank
        if self.query_norm is None:
            queries = self.query(x)
        else:
            queries = self.query(self.query_norm(down[:, : mla.q_lora_rank]))
            down = down[:, mla.q_lora_rank :]
        latent = self.latent_norm(down[:, :rank])
        queries = queries.view(n, self.heads, -1)
        plain, turned = queries[..., : mla.qk_nope_head_dim], queries[..., mla.qk_nope_head_dim :]
        turned = rotary.rotate(turned, tables)
        shared_key = rotary.rotate(down[:, None, rank:], tables)
        up = self.up.view(self.heads, mla.qk_nope_head_dim + mla.v_head_dim, rank)
        # (heads, n, nope) x (heads, nope, rank): the queries as the latent sees them.
        absorbed = torch.bmm(plain.transpose(0, 1), up[:, : mla.qk_nope_head_dim]).transpose(0, 1)
        query = torch.cat([absorbed, turned], dim=-1)
        key = torch.cat([latent.unsqueeze(1), shared_key], dim=-1)
        attended = self.attention(query, key, key[..., :rank], step.keys[place], step.values[place], step.attention)
        by_head = attended.view(n, self.heads, rank).transpose(0, 1)
        values = torch.bmm(by_head, up[:, mla.qk_nope_head_dim :].transpose(1, 2))
        return self.out(values.transpose(0, 1).reshape(n, -1))
