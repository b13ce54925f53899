"""What a spec says of a checkpoint is what transformers makes of the same folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from drumline.protocol.modelspec import SUPPORTED_ARCHITECTURES, ModelSpec
from tests.checkpoints import ALL_CHECKPOINTS, Checkpoints
from tests.parametercount import count_parameters

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "MixtralForCausalLM": MixtralConfig,
    "DeepseekV2ForCausalLM": DeepseekV2Config,
    "DeepseekV3ForCausalLM": DeepseekV3Config,
}
# What a config must have, here as large as transformers would make it.
REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


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


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_what_a_config_leaves_out_is_what_transformers_would_fill_in(architecture: str) -> None:
    complete = CONFIGS[architecture]().to_dict() | {"architectures": [architecture], "bos_token_id": None}
    sparse = {name: complete[name] for name in (*REQUIRED, "architectures", "eos_token_id")}
    if architecture == "Qwen3MoeForCausalLM":
        sparse["moe_intermediate_size"] = complete["moe_intermediate_size"]
    # transformers fills in null, which it could not run.
    if architecture == "DeepseekV2ForCausalLM":
        complete["num_experts_per_tok"] = sparse["num_experts_per_tok"] = 6
    found = ModelSpec.from_config(sparse, "sparse")
    assert found == ModelSpec.from_config(complete, "complete")
    assert found.max_position_embeddings == complete["max_position_embeddings"]
