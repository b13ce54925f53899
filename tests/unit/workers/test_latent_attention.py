"""Attention whose cache has no values: they are the first channels of the keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drumline.workers.layers import AttentionInputs, DecodeRows, PagedAttention, PrefillSequence

HEADS, DIM, VALUES, SIZE, SCALE = 3, 10, 6, 4, 0.21


def plain(q: Tensor, keys: Tensor) -> Tensor:
    """One query (heads, dim) over keys (tokens, dim), all of which it sees."""
    weights = (q.float() @ keys.float().T * SCALE).softmax(-1)
    return (weights @ keys.float()[:, :VALUES]).view(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_decodes_chunks_and_prompts_attend_over_one_key_for_all_heads(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    cache = torch.randn(1, 8, SIZE, DIM).to(dtype)
    # A: 5 tokens, the last one new, in blocks 6 and 1. B: 6 tokens, 2 new, in 0 and 3. C: 3 tokens, all new, in 5.
    tables, lengths, fresh = ([6, 1], [0, 3], [5]), (5, 6, 3), (1, 2, 3)
    keys = [torch.randn(length, DIM).to(dtype) for length in lengths]
    slots = [[blocks[p // SIZE] * SIZE + p % SIZE for p in range(n)] for blocks, n in zip(tables, lengths, strict=True)]
    for of_row, key, new in zip(slots, keys, fresh, strict=True):
        cache.flatten(1, 2)[0, of_row[:-new]] = key[:-new]
    new_slots = [slot for of_row, new in zip(slots, fresh, strict=True) for slot in of_row[-new:]]
    new_keys = torch.cat([key[-new:] for key, new in zip(keys, fresh, strict=True)])
    q = torch.randn(6, HEADS, DIM).to(dtype)
    bias = torch.zeros(1, 1, 8)
    bias[..., 5:] = float("-inf")
    inputs = AttentionInputs(
        slots=torch.tensor(new_slots),
        decodes=(DecodeRows(0, 1, torch.tensor([6, 1]), bias, torch.empty(1, 2, SIZE, DIM, dtype=dtype), None),),
        prefills=(
            PrefillSequence(1, 3, 6, torch.tensor([0, 3]), torch.arange(6) <= torch.tensor([[4], [5]])),
            PrefillSequence(3, 6, 3, torch.tensor([5]), None),
        ),
    )
    key = new_keys.unsqueeze(1)
    found = PagedAttention(HEADS, 1, DIM, VALUES, SCALE)(q, key, key[..., :VALUES], cache, None, inputs)
    seen = [keys[0], keys[1][:5], keys[1], keys[2][:1], keys[2][:2], keys[2]]
    expected = torch.stack([plain(query, of_row) for query, of_row in zip(q, seen, strict=True)])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache.flatten(1, 2)[0, new_slots], new_keys)
