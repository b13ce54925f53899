"""The gates against the rules of their papers, token by token in plain Python, and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from drumline.protocol.modelspec import MoeSpec
from drumline.workers.layers import Gate, GroupedGate, SoftmaxGate

HIDDEN, EXPERTS = 6, 12


def spec(**changes: object) -> MoeSpec:
    values = {"num_experts": EXPERTS, "top_k": 3, "moe_intermediate_size": 4, "norm_topk_prob": False, "layers": (0,)}
    return MoeSpec(**(values | changes))  # type: ignore[arg-type]


def plain_route(logits: list[float], bias: list[float] | None, moe: MoeSpec) -> dict[int, float]:
    """Routing weight by expert."""
    if moe.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choice = scores if bias is None else [score + b for score, b in zip(scores, bias, strict=True)]
    allowed = list(range(len(logits)))
    if moe.topk_method != "greedy":
        size = len(logits) // moe.num_groups
        groups = [allowed[start : start + size] for start in range(0, len(logits), size)]
        best = 1 if moe.topk_method == "group_limited_greedy" else 2
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
        allowed = [expert for group in groups[: moe.topk_groups] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[: moe.top_k]
    whole = sum(scores[expert] for expert in chosen) if moe.norm_topk_prob else 1.0
    return {expert: scores[expert] / whole * moe.routed_scaling_factor for expert in chosen}


GROUPED = {"num_groups": 4, "topk_groups": 2}
CASES = {
    "qwen3-moe": spec(),
    "mixtral": spec(norm_topk_prob=True, top_k=2),
    "v2-greedy": spec(routed_scaling_factor=2.5),
    "v2-groups": spec(topk_method="group_limited_greedy", routed_scaling_factor=16.0, **GROUPED),
    "v2-groups-normalised": spec(topk_method="group_limited_greedy", norm_topk_prob=True, **GROUPED),
    "v3": spec(topk_method="noaux_tc", scoring="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, **GROUPED),
    "v3-not-normalised": spec(topk_method="noaux_tc", scoring="sigmoid", top_k=5, **GROUPED),
}


def gate_of(name: str, weight: Tensor, bias: Tensor | None) -> Gate:
    if name.startswith("v"):
        return GroupedGate(weight, bias, CASES[name])
    return SoftmaxGate(weight, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_token_goes_where_the_rules_say_with_the_weights_that_they_say(name: str) -> None:
    torch.manual_seed(3)
    moe = CASES[name]
    weight, x = torch.randn(EXPERTS, HIDDEN), torch.randn(50, HIDDEN)
    # Large enough that it changes the choice, negative ones too: an expert beyond the chosen groups must stay beyond.
    bias = torch.randn(EXPERTS) - 1.0 if moe.topk_method == "noaux_tc" else None
    weights, experts = gate_of(name, weight, bias)(x)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int64)
    assert weights.shape == experts.shape == (50, moe.top_k)
    for token in range(50):
        found = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        expected = plain_route((weight @ x[token]).tolist(), None if bias is None else bias.tolist(), moe)
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_no_token_is_no_route(name: str) -> None:
    bias = torch.randn(EXPERTS) if CASES[name].topk_method == "noaux_tc" else None
    weights, experts = gate_of(name, torch.randn(EXPERTS, HIDDEN), bias)(torch.empty(0, HIDDEN))
    assert weights.shape == experts.shape == (0, CASES[name].top_k)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int64)


def test_the_v3_gate_is_the_one_of_transformers() -> None:
    torch.manual_seed(4)
    moe = CASES["v3"]
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=moe.top_k,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        moe_intermediate_size=4,
        n_shared_experts=1,
    )
    theirs = DeepseekV3TopkRouter(config)
    weight, bias, x = torch.randn(EXPERTS, HIDDEN), torch.rand(EXPERTS) * 0.4, torch.randn(64, HIDDEN)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        theirs.e_score_correction_bias.copy_(bias)
        _, weights, experts = theirs(x)
    found_weights, found = GroupedGate(weight, bias, moe)(x)
    order, found_order = experts.argsort(1), found.argsort(1)
    assert torch.equal(experts.gather(1, order), found.gather(1, found_order))
    torch.testing.assert_close(found_weights.gather(1, found_order), weights.gather(1, order), rtol=1e-5, atol=1e-6)


def test_a_grouped_gate_scores_bfloat16_in_float32() -> None:
    torch.manual_seed(5)
    weight, bias, x = torch.randn(EXPERTS, HIDDEN).bfloat16(), torch.randn(EXPERTS), torch.randn(30, HIDDEN).bfloat16()
    found = GroupedGate(weight, bias, CASES["v3"])(x)
    expected = GroupedGate(weight.float(), bias, CASES["v3"])(x.float())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
