"""Which experts a token goes to, and with what weights: the gates of the supported architectures."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.modelspec import MoeSpec
from drumline.workers.layers.linear import Linear


class Gate(Protocol):
    """A router of tokens."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, hidden) to routing weights float32 (n, K) and logical experts int64 (n, K)."""
        ...


class SoftmaxGate:
    """Softmax over all experts, the best K of them, normalised where the model says so. (Qwen3-MoE, Mixtral)"""

    def __init__(self, weight: Tensor, moe: MoeSpec):
        self.router = Linear(weight)
        self._top_k = moe.top_k
        self._normalise = moe.norm_topk_prob

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.router(x).softmax(-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self._top_k, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts


class GroupedGate:
    """The gates of DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and V3 (https://arxiv.org/abs/2412.19437).

    Scores are computed in float32. Unless ``topk_method`` is greedy only experts of the best groups can be chosen: a
    group is as good as its best expert (V2), or its two best together, the correction ``bias`` (experts,) included
    (V3). The bias decides who is chosen, never with what weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, moe: MoeSpec):
        self.weight = weight
        self.bias = bias
        self._moe = moe

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moe = self._moe
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        if moe.topk_method != "greedy":
            choice = self._within_best_groups(choice)
        experts = choice.topk(moe.top_k, dim=-1).indices
        weights = (choice if self.bias is None else scores).gather(1, experts)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * moe.routed_scaling_factor, experts

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        moe = self._moe
        grouped = choice.view(len(choice), moe.num_groups, moe.num_experts // moe.num_groups)
        if self.bias is None:
            quality, out = grouped.amax(-1), 0.0
        else:
            quality, out = grouped.topk(2, dim=-1).values.sum(-1), float("-inf")
        best = quality.topk(moe.topk_groups, dim=-1).indices
        others = torch.ones_like(quality, dtype=torch.bool).scatter_(1, best, value=False)
        return grouped.masked_fill(others.unsqueeze(-1), out).flatten(1)
