"""Attention over blocks against a plain restatement of its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drumline.workers.layers import AttentionInputs, DecodeRows, PagedAttention, PrefillSequence


def plain_attention(q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
    """One query (heads, dim) at ``position`` over keys and values (tokens, kv heads, dim)."""
    group = q.shape[0] // k.shape[1]
    out = []
    for head in range(q.shape[0]):
        keys, values = k[: position + 1, head // group], v[: position + 1, head // group]
        weights = ((keys @ q[head]) / math.sqrt(q.shape[1])).softmax(-1)
        out.append(weights @ values)
    return torch.cat(out)


def test_decodes_and_prefills_in_one_call_are_causal_attention_over_their_own_blocks() -> None:
    torch.manual_seed(0)
    heads, kv_heads, dim, size = 4, 2, 8, 4
    k, v = torch.randn(20, kv_heads, dim), torch.randn(20, kv_heads, dim)
    keys, values = torch.randn(kv_heads, 8, size, dim), torch.randn(kv_heads, 8, size, dim)
    # A: 7 tokens, the last one new, in blocks 5 and 1. B: 6 tokens, 3 new, in 2 and 7. C: 5 tokens, all new, in 0, 3.
    tables = {"a": ([5, 1], k[:7], v[:7]), "b": ([2, 7], k[7:13], v[7:13]), "c": ([0, 3], k[13:18], v[13:18])}
    slots = {
        name: [table[0][p // size] * size + p % size for p in range(len(table[1]))] for name, table in tables.items()
    }
    for name, computed in (("a", 6), ("b", 3)):
        keys.flatten(1, 2)[:, slots[name][:computed]] = tables[name][1][:computed].transpose(0, 1)
        values.flatten(1, 2)[:, slots[name][:computed]] = tables[name][2][:computed].transpose(0, 1)
    new_k, new_v = torch.cat([k[6:7], k[10:13], k[13:18]]), torch.cat([v[6:7], v[10:13], v[13:18]])
    q = torch.randn(9, heads, dim)
    bias = torch.zeros(kv_heads, 1, 8)
    bias[..., 7:] = float("-inf")
    mask = torch.arange(6) <= torch.tensor([[3], [4], [5]])
    inputs = AttentionInputs(
        slots=torch.tensor(slots["a"][6:] + slots["b"][3:] + slots["c"]),
        decodes=(DecodeRows(0, 1, torch.tensor([5, 1]), bias, *torch.empty(2, kv_heads, 2, size, dim)),),
        prefills=(
            PrefillSequence(1, 4, 6, torch.tensor([2, 7]), mask),
            PrefillSequence(4, 9, 5, torch.tensor([0, 3]), None),
        ),
    )
    found = PagedAttention(heads, kv_heads, dim, dim, dim**-0.5)(q, new_k, new_v, keys, values, inputs)
    expected = [plain_attention(q[0], *tables["a"][1:], 6)]
    expected += [plain_attention(q[1 + i], *tables["b"][1:], 3 + i) for i in range(3)]
    expected += [plain_attention(q[4 + i], *tables["c"][1:], i) for i in range(5)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
