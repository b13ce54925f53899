"""Qwen3-MoE: Qwen3 with a mixture of experts in the layers that the config names."""

from __future__ import annotations

from drumline.protocol.modelspec import ModelSpec
from drumline.workers.layers import GatedMlp, MoeLayer
from drumline.workers.loading import LoadPlan
from drumline.workers.models.decoder import Decoder, ModelPlacement, dense_mlp


def build_qwen3_moe(spec: ModelSpec, placement: ModelPlacement) -> Decoder:
    """The model, its weights allocated for the experts that ``placement`` gives this rank, and not yet loaded."""
    return Decoder(spec, placement, qk_norm=True, mlp=sparse_mlp)


def sparse_mlp(spec: ModelSpec, placement: ModelPlacement, layer: int, plan: LoadPlan) -> GatedMlp | MoeLayer:
    """The experts that this rank holds of ``layer``, or its dense network where the config says so."""
    moe = spec.moe
    if moe is None or layer not in moe.layers:
        return dense_mlp(spec, placement, layer, plan)
    moe_index = moe.layers.index(layer)
    prefix, width, hidden = f"model.layers.{layer}.mlp", moe.moe_intermediate_size, spec.hidden_size
    held = placement.local_experts(moe_index)
    block = MoeLayer(
        placement.empty(moe.num_experts, hidden),
        placement.empty(len(held), 2 * width, hidden),
        placement.empty(len(held), hidden, width),
        placement.routing(moe_index),
        top_k=moe.top_k,
        normalise=moe.norm_topk_prob,
    )
    plan.add(f"{prefix}.gate.weight", block.router.weight)
    for slot, expert in enumerate(held):
        plan.add(f"{prefix}.experts.{expert}.gate_proj.weight", block.gate_up[slot, :width])
        plan.add(f"{prefix}.experts.{expert}.up_proj.weight", block.gate_up[slot, width:])
        plan.add(f"{prefix}.experts.{expert}.down_proj.weight", block.down[slot])
    for expert in set(range(moe.num_experts)).difference(held):
        for part in ("gate_proj", "up_proj", "down_proj"):
            plan.leave(f"{prefix}.experts.{expert}.{part}.weight")
    return block
