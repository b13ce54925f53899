"""Causal attention with grouped query heads over paged keys and values.

The cache of a layer is (kv heads, blocks, block size, head dim): a gather of blocks then gives, for each kv head, the
keys of a sequence in one contiguous piece, and the query heads that share it are the rows of one matrix product.

With latent attention there is one key for all heads, and the value is its first channels: nothing else is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(slots=True, frozen=True)
class PrefillSequence:
    """One sequence that computes several tokens: rows ``start`` to ``end`` of the step's tokens.

    ``blocks``: int64 (blocks,) that hold its ``context`` tokens, those of this step included. ``mask``: bool
    (end - start, context), true where a token may look, or None when the sequence starts here and is plainly causal.
    """

    start: int
    end: int
    context: int
    blocks: Tensor
    mask: Tensor | None


@dataclass(slots=True, frozen=True)
class DecodeRows:
    """Sequences of similar length that compute one token each: rows ``start`` to ``end`` (count) of the step's tokens.

    ``blocks``: int64 (count * width,), padded with any valid block to the width of the longest. ``bias``: float32
    (kv heads * count, 1, width * block_size), 0 where a sequence has tokens and -inf beyond, repeated for each kv head.
    ``keys`` and ``values``: scratch (kv heads, count * width, block size, channels), used by one layer after another;
    no values with latent attention.
    """

    start: int
    end: int
    blocks: Tensor
    bias: Tensor
    keys: Tensor
    values: Tensor | None


@dataclass(slots=True, frozen=True)
class AttentionInputs:
    """What every layer of a step needs to know of its tokens: first those of ``decodes``, then those of ``prefills``.

    ``slots``: int64 (n,), where each token's keys and values go: block * block_size + offset.
    """

    slots: Tensor
    decodes: tuple[DecodeRows, ...]
    prefills: tuple[PrefillSequence, ...]


class PagedAttention:
    """Attention of one layer. Holds no weights; ``keys`` and ``values`` are the layer's part of the cache.

    ``value_dim``: channels of a value. Where the cache has no values (None) they are the first channels of the keys.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, scale: float):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.group = num_heads // num_kv_heads
        self.scale = scale

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor | None, inputs: AttentionInputs
    ) -> Tensor:
        """Write the step's keys and values, then attend.

        ``q`` (n, heads, head_dim), ``k`` (n, kv heads, head_dim), ``v`` (n, kv heads, value_dim), ``keys`` and
        ``values`` (kv heads, blocks, block size, head_dim or value_dim). Returns (n, heads * value_dim).
        """
        # A prompt sees its own keys as a later chunk of it would: rounded to the cache's dtype.
        k, v = k.to(keys.dtype), v.to(keys.dtype)
        keys.flatten(1, 2).index_copy_(1, inputs.slots, k.transpose(0, 1))
        if values is not None:
            values.flatten(1, 2).index_copy_(1, inputs.slots, v.transpose(0, 1))
        parts = [self._decode(q, keys, values, decode) for decode in inputs.decodes]
        parts.extend(self._prefill(q, k, v, keys, values, sequence) for sequence in inputs.prefills)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor | None, decode: DecodeRows) -> Tensor:
        rows, heads, dim = decode.end - decode.start, self.num_kv_heads, self.head_dim
        gathered_keys = torch.index_select(keys, 1, decode.blocks, out=decode.keys).view(heads * rows, -1, dim)
        if values is None:
            gathered_values = gathered_keys[..., : self.value_dim]
        else:
            gathered_values = torch.index_select(values, 1, decode.blocks, out=decode.values)
            gathered_values = gathered_values.view(heads * rows, -1, self.value_dim)
        grouped = (
            q[decode.start : decode.end]
            .view(rows, heads, self.group, dim)
            .transpose(0, 1)
            .reshape(heads * rows, self.group, dim)
        )
        out = self._attend(grouped, gathered_keys.to(q.dtype), gathered_values.to(q.dtype), decode.bias)
        return out.view(heads, rows, self.group, -1).transpose(0, 1).reshape(rows, -1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Scores and their softmax are float32 whatever the dtype of queries and keys."""
        if q.dtype == torch.float32:
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=self.scale)
        else:
            scores = torch.bmm(q, keys.transpose(1, 2)).float().mul_(self.scale).add_(bias)
        return torch.bmm(scores.softmax(-1).to(q.dtype), values)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor | None, sequence: PrefillSequence
    ) -> Tensor:
        start, end = sequence.start, sequence.end
        count, heads, dim = end - start, self.num_kv_heads, self.head_dim
        # (kv heads, group, count, dim) against (kv heads, 1, context, dim): the group shares keys without a copy.
        grouped = q[start:end].view(count, heads, self.group, dim).permute(1, 2, 0, 3)
        if sequence.mask is None:
            own_keys, own_values = k[start:end].transpose(0, 1).to(q.dtype), v[start:end].transpose(0, 1).to(q.dtype)
        else:
            own_keys = self._cached(keys, sequence).to(q.dtype)
            own_values = own_keys[..., : self.value_dim]
            if values is not None:
                own_values = self._cached(values, sequence).to(q.dtype)
        shape = (heads, self.group, own_keys.shape[1])
        out = F.scaled_dot_product_attention(
            grouped,
            own_keys.unsqueeze(1).expand(*shape, dim),
            own_values.unsqueeze(1).expand(*shape, self.value_dim),
            attn_mask=sequence.mask,
            is_causal=sequence.mask is None,
            scale=self.scale,
        )
        return out.permute(2, 0, 1, 3).reshape(count, -1)

    @staticmethod
    def _cached(part: Tensor, sequence: PrefillSequence) -> Tensor:
        return part.index_select(1, sequence.blocks).flatten(1, 2)[:, : sequence.context]
