"""Layers against plain restatements of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import RopeScaling
from drumline.workers.layers import (
    AttentionInputs,
    DecodeRows,
    Linear,
    MoeLayer,
    PagedAttention,
    PrefillSequence,
    RotaryEmbedding,
    RoutingView,
)
from drumline.workers.layers.rotary import inverse_frequencies

CPU = torch.device("cpu")


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
    found = PagedAttention(heads, kv_heads, dim)(q, new_k, new_v, keys, values, inputs)
    expected = [plain_attention(q[0], *tables["a"][1:], 6)]
    expected += [plain_attention(q[1 + i], *tables["b"][1:], 3 + i) for i in range(3)]
    expected += [plain_attention(q[4 + i], *tables["c"][1:], i) for i in range(5)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_rotation_turns_channel_pairs_by_position() -> None:
    rotary = RotaryEmbedding(4, 100.0, RopeScaling(), 50, CPU)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    found = rotary.rotate(x, rotary.at(torch.tensor([7])))[0, 0]
    for pair, frequency in ((0, 1.0), (1, 0.1)):
        cos, sin = math.cos(7 * frequency), math.sin(7 * frequency)
        a, b = float(x[0, 0, pair]), float(x[0, 0, pair + 2])
        assert float(found[pair]) == pytest.approx(a * cos - b * sin, abs=1e-6)
        assert float(found[pair + 2]) == pytest.approx(b * cos + a * sin, abs=1e-6)


def test_llama3_scaling_slows_long_waves_keeps_short_ones_and_passes_between() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 1000)
    plain = inverse_frequencies(64, 10000.0, RopeScaling())
    scaled = inverse_frequencies(64, 10000.0, scaling)
    wavelengths = 2 * math.pi / plain
    ratio = scaled / plain
    assert bool((ratio[wavelengths < 250] == 1).all())
    assert torch.allclose(ratio[wavelengths > 1000], torch.tensor(1 / 8))
    between = ratio[(wavelengths > 250) & (wavelengths < 1000)]
    assert len(between) > 0
    assert bool(((between > 1 / 8) & (between < 1)).all())
    assert bool((between.diff() < 0).all())


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="yarn"):
        inverse_frequencies(8, 10000.0, RopeScaling("yarn"))


def test_moe_is_the_weighted_sum_of_the_chosen_experts() -> None:
    torch.manual_seed(1)
    hidden, width, experts, top_k, tokens = 8, 6, 5, 2, 11
    slots_of = torch.tensor([3, 0, 4, 1, 2])
    gate_up, down = torch.randn(experts, 2 * width, hidden), torch.randn(experts, hidden, width)
    router, x = torch.randn(experts, hidden), torch.randn(tokens, hidden)
    routing = RoutingView(slots_of, torch.zeros(experts, dtype=torch.int64), 0, experts)
    layer = MoeLayer(router, gate_up, down, routing, top_k=top_k, normalise=True)
    found = layer(x, [tokens])
    counted = torch.zeros(experts, dtype=torch.int64)
    for token in range(tokens):
        probabilities = (router @ x[token]).softmax(-1)
        weights, chosen = probabilities.topk(top_k)
        total = torch.zeros(hidden)
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            slot = int(slots_of[expert])
            counted[slot] += 1
            gate, up = (gate_up[slot] @ x[token]).chunk(2)
            total += weight * (down[slot] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(found[token], total, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.load, counted)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_linear_is_the_same_product(tokens: int, biased: bool) -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(640, 512), torch.randn(640) if biased else None
    x = torch.randn(tokens, 512)
    layer = Linear(weight, bias)
    expected = layer(x)
    layer.pack()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_a_small_linear_is_left_as_it_is() -> None:
    layer = Linear(torch.randn(32, 16))
    layer.pack()
    assert layer.weight.device.type == "cpu"
