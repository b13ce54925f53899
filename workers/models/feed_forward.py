"""The feed-forward block of a layer: a dense network, or a mixture of experts."""

from __future__ import annotations

from typing import TypeAlias

from drumline.protocol.modelspec import MoeSpec
from drumline.protocol.weights import expert_names
from drumline.workers.experts.reading import plan_expert
from drumline.workers.layers import (
    Gate,
    GatedMlp,
    GroupedGate,
    LocalExperts,
    MoeLayer,
    ParallelMlp,
    RoutingView,
    SoftmaxGate,
)
from drumline.workers.models.build import ModelBuild

Mlp: TypeAlias = ParallelMlp | MoeLayer


def feed_forward(build: ModelBuild, layer: int) -> Mlp:
    """What the model has in ``layer``, as much of it as the rank holds."""
    moe = build.spec.moe
    if moe is None or layer not in moe.layers:
        return dense(build, f"model.layers.{layer}.mlp")
    return mixture(build, moe, layer)


def dense(build: ModelBuild, prefix: str) -> ParallelMlp:
    """A gated network under the names that begin with ``prefix``."""
    gate_up = build.load_rows(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    return ParallelMlp(GatedMlp(gate_up, build.load(f"{prefix}.down_proj.weight")), build.groups)


def mixture(build: ModelBuild, moe: MoeSpec, layer: int) -> MoeLayer:
    """The gate and the experts, or the channels of all experts, that this rank holds of ``layer``. Where tokens go
    from there is for an epoch to say."""
    block = f"model.layers.{layer}.{expert_names(build.spec).block}"
    held = build.local_experts(moe.layers.index(layer))
    width = build.shards.expert_mlp[1] - build.shards.expert_mlp[0]
    gate_up = build.empty(len(held), 2 * width, build.spec.hidden_size)
    down = build.empty(len(held), build.spec.hidden_size, width)
    for slot, expert in enumerate(held):
        plan_expert(build.plan, build.shards, layer, expert, gate_up[slot], down[slot])
    return MoeLayer(
        _gate(build, moe, block),
        LocalExperts(gate_up, down),
        RoutingView.nowhere(build.device),
        build.groups,
        dense(build, f"{block}.shared_experts") if moe.shared_intermediate_size else None,
        sharded=False,
    )


def _gate(build: ModelBuild, moe: MoeSpec, block: str) -> Gate:
    weight = build.load(f"{block}.gate.weight")
    if build.spec.mla is None:
        return SoftmaxGate(weight, moe)
    return GroupedGate(weight, build.load_if(f"{block}.gate.e_score_correction_bias"), moe)
