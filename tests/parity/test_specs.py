"""What a spec says of a checkpoint is what transformers makes of the same folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from drumline.protocol.modelspec import ModelSpec
from tests.checkpoints import ALL_CHECKPOINTS, Checkpoints
from tests.parametercount import count_parameters


@pytest.fixture(params=ALL_CHECKPOINTS)
def folder(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    return checkpoints(request.param)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_checkpoint_holds_as_many_numbers_as_the_spec_implies(folder: Path) -> None:
    held = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert count_parameters(ModelSpec.from_folder(folder)) == held


def test_rotation_and_attention_scale_agree(folder: Path) -> None:
    spec, model = ModelSpec.from_folder(folder), model_of(folder).model
    attention, rotary = model.layers[0].self_attn, model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(spec.rope_scaling.attention_factor, rel=1e-12)
    assert attention.scaling == pytest.approx(spec.softmax_scale or spec.head_dim**-0.5, rel=1e-12)
    assert len(rotary.inv_freq) * 2 == spec.rotary_dim
    assert (attention.o_proj.bias is not None) == spec.attention_output_bias
    assert hasattr(attention, "q_norm") == spec.qk_norm


def test_experts_agree(folder: Path) -> None:
    spec, model = ModelSpec.from_folder(folder), model_of(folder).model
    assert tuple(i for i, layer in enumerate(model.layers) if hasattr(layer.mlp, "gate")) == spec.moe_layers
    for index in spec.moe_layers:
        assert spec.moe is not None
        mlp, moe = model.layers[index].mlp, spec.moe
        assert (mlp.gate.num_experts, mlp.gate.top_k) == (moe.num_experts, moe.top_k)
        assert mlp.experts.down_proj.shape[-1] == moe.moe_intermediate_size
        shared = mlp.shared_experts.up_proj.out_features if hasattr(mlp, "shared_experts") else 0
        assert shared == moe.shared_intermediate_size
        assert getattr(mlp.gate, "routed_scaling_factor", 1.0) == moe.routed_scaling_factor
        assert hasattr(mlp.gate, "e_score_correction_bias") == (moe.topk_method == "noaux_tc")
        if moe.num_groups > 1:
            assert (mlp.gate.num_group, mlp.gate.topk_group) == (moe.num_groups, moe.topk_groups)
