from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import ModelSpec, MoeSpec, RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3: dict[str, Any] = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
MOE: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def write(folder: Path, config: object, generation: object | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, config: object, generation: object | None = None) -> ModelSpec:
    return ModelSpec.from_folder(write(folder, config, generation))


def test_a_llama_folder_of_transformers_4(tmp_path: Path) -> None:
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    assert read(tmp_path, old) == ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=1000,
        rms_norm_eps=1e-05,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
        tie_word_embeddings=True,
        attention_bias=False,
        qk_norm=False,
        max_position_embeddings=512,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="bfloat16",
        moe=None,
    )


def test_both_key_styles_mean_the_same_model(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    old = MOE | {"rope_theta": 1e6, "rope_scaling": {"type": "llama3"} | scaling, "torch_dtype": "float32"}
    new = MOE | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"} | scaling, "dtype": "float32"}
    new["num_local_experts"] = new.pop("num_experts")
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    spec = read(tmp_path / "old", old)
    assert spec == read(tmp_path / "new", new)
    assert spec.rope_theta == 1e6
    assert spec.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 256)
    assert spec.moe == MoeSpec(num_experts=16, top_k=4, moe_intermediate_size=48, norm_topk_prob=True, layers=(0, 1))
    assert spec.qk_norm
    assert spec.head_dim == 32


def test_linear_scaling_and_default_rope(tmp_path: Path) -> None:
    linear = read(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert linear.rope_theta == 10000.0
    assert read(tmp_path, LLAMA | {"rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    sparse = {k: v for k, v in MOE.items() if k not in ("head_dim", "norm_topk_prob", "rms_norm_eps", "eos_token_id")}
    spec = read(tmp_path, sparse)
    assert (spec.head_dim, spec.rms_norm_eps, spec.eos_token_ids, spec.dtype) == (16, 1e-6, (), "float32")
    assert spec.moe is not None
    assert not spec.moe.norm_topk_prob
    dense = {k: v for k, v in QWEN3.items() if k not in ("head_dim", "num_key_value_heads")}
    spec = read(tmp_path, dense)
    assert (spec.head_dim, spec.num_kv_heads) == (128, 4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"decoder_sparse_step": 2, "num_hidden_layers": 5}, (1, 3)),
        ({"mlp_only_layers": [0, 2], "num_hidden_layers": 4}, (1, 3)),
        ({"mlp_only_layers": None, "num_hidden_layers": 2}, (0, 1)),
        ({"num_experts": 0, "num_hidden_layers": 2}, ()),
    ],
)
def test_which_layers_have_experts(tmp_path: Path, config: dict[str, Any], expected: tuple[int, ...]) -> None:
    spec = read(tmp_path, MOE | config)
    assert spec.moe_layers == expected
    assert spec.is_moe == bool(expected)
    assert spec.num_experts == (16 if expected else 0)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, (2,)),
        ([3, 4], None, (3, 4)),
        (2, {"eos_token_id": [5, 6, 5]}, (5, 6)),
        (2, {"temperature": 0.5}, (2,)),
        (None, {"eos_token_id": 9}, (9,)),
    ],
)
def test_eos_comes_from_the_generation_config_first(
    tmp_path: Path, in_config: object, in_generation: object, expected: tuple[int, ...]
) -> None:
    assert read(tmp_path, LLAMA | {"eos_token_id": in_config}, in_generation).eos_token_ids == expected


@pytest.mark.parametrize(
    "harmless",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"use_sliding_window": True, "sliding_window": None},
        {"layer_types": ["full_attention", "full_attention"]},
        {"quantization_config": None, "mlp_bias": False, "partial_rotary_factor": 1.0},
        {"attention_bias": True},
        {"some_key_of_the_future": {"a": 1}},
    ],
)
def test_settings_without_effect_are_accepted(tmp_path: Path, harmless: dict[str, Any]) -> None:
    assert read(tmp_path, QWEN3 | harmless).attention_bias == harmless.get("attention_bias", False)


@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures", "Qwen3MoeForCausalLM"),
        ({"architectures": []}, "architectures", "LlamaForCausalLM"),
        ({"architectures": None}, "architectures", "Qwen3ForCausalLM"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures", "a list"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window", "false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "full_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types", "2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "absent"),
        ({"mlp_bias": True}, "mlp_bias", "false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size", "0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type", "default, linear, llama3"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.rope_type", "linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor", "above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling", "object"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_parameters.high_freq_factor",
            "more than",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor", "1.0"),
        ({"rope_parameters": {"full_attention": {}, "rope_type": ["x"]}}, "rope_parameters.rope_type", "default"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "1 to"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers", "1 to"),
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers", "1 to 4096"),
        ({"max_position_embeddings": (1 << 31) - 1}, "max_position_embeddings", "1 to 16777216"),
        ({"hidden_size": None}, "hidden_size", "whole number"),
        ({"hidden_size": 64.0}, "hidden_size", "whole number"),
        ({"hidden_size": True}, "hidden_size", "whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "divisor"),
        ({"head_dim": 7}, "head_dim", "even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps", "number"),
        ({"rope_theta": 10**400}, "rope_theta", "finite"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
        ({"eos_token_id": 1000}, "eos_token_id", "0 to 999"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id", "0 to 999"),
        ({"bos_token_id": -1}, "bos_token_id", "0 to 999"),
        ({"torch_dtype": "float8"}, "torch_dtype", "bfloat16"),
        ({"dtype": ["float32"]}, "dtype", "bfloat16"),
    ],
)
def test_what_is_not_implemented_or_not_possible_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str, valid: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read(tmp_path, QWEN3 | change)
    assert caught.value.field == field
    assert valid in caught.value.info.valid
    assert "config.json" in caught.value.text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": [2]}, "mlp_only_layers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers"),
        ({"num_experts": -1}, "num_experts"),
    ],
)
def test_impossible_expert_settings_are_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read(tmp_path, MOE | change)
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000, "\ud800"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidConfig, match="JSON"):
        ModelSpec.from_folder(tmp_path)


def test_a_missing_folder_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="nowhere"):
        ModelSpec.from_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidConfig, match=r"no config\.json"):
        ModelSpec.from_folder(tmp_path)


def test_a_config_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(InvalidConfig, match="at most"):
        ModelSpec.from_folder(tmp_path)


def test_a_long_wrong_value_is_shown_shortened(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read(tmp_path, LLAMA | {"quantization_config": {"key": "x" * 10_000}})
    assert len(caught.value.text) < 1000
