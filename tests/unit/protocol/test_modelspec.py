from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import SUPPORTED_ARCHITECTURES, ModelSpec, MoeSpec, RopeScaling
from tests.unit.protocol.modelconfigs import LLAMA, MIXTRAL, MOE, QWEN2, QWEN3, parse, read, without


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


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    sparse = without(MOE, "head_dim", "norm_topk_prob", "rms_norm_eps", "eos_token_id", "num_key_value_heads")
    spec = read(tmp_path, sparse | {"num_attention_heads": 8})
    assert (spec.head_dim, spec.rms_norm_eps, spec.eos_token_ids, spec.dtype) == (8, 1e-6, (), "float32")
    assert spec.num_kv_heads == 4
    assert spec.moe is not None
    assert not spec.moe.norm_topk_prob
    spec = read(tmp_path, without(QWEN3, "head_dim", "num_key_value_heads") | {"num_attention_heads": 64})
    assert (spec.head_dim, spec.num_kv_heads) == (128, 32)
    spec = read(tmp_path, without(LLAMA, "num_key_value_heads"))
    assert (spec.head_dim, spec.num_kv_heads) == (16, 4)


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, MOE, MIXTRAL])
def test_key_value_heads_of_null_are_one_per_query_head(config: dict[str, Any]) -> None:
    assert parse(config | {"num_key_value_heads": None}).num_kv_heads == 4


def test_an_attention_bias_is_one_of_the_output_too(tmp_path: Path) -> None:
    for config in (LLAMA, QWEN3, MOE):
        spec = read(tmp_path, config | {"attention_bias": True})
        assert (spec.attention_bias, spec.attention_output_bias) == (True, True)


def test_qwen2_has_a_bias_on_queries_keys_and_values_whatever_its_config_says(tmp_path: Path) -> None:
    for change in ({}, {"attention_bias": False}, {"use_sliding_window": False, "sliding_window": 4, "head_dim": 16}):
        spec = read(tmp_path, QWEN2 | change)
        assert (spec.attention_bias, spec.attention_output_bias, spec.qk_norm) == (True, False, False)
        assert (spec.num_kv_heads, spec.head_dim, spec.rotary_dim, spec.moe) == (2, 16, 16, None)
    assert parse(
        without(QWEN2, "num_key_value_heads", "max_position_embeddings") | {"num_attention_heads": 32}
    ) == parse(QWEN2 | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768})


def test_mixtral_has_experts_in_every_layer_and_normalises(tmp_path: Path) -> None:
    spec = read(tmp_path, MIXTRAL)
    assert spec.moe == MoeSpec(num_experts=4, top_k=2, moe_intermediate_size=128, norm_topk_prob=True, layers=(0, 1))
    assert (spec.attention_bias, spec.attention_output_bias, spec.qk_norm) == (False, False, False)
    assert spec == parse(without(MIXTRAL, "num_local_experts") | {"num_experts": 4})


def test_what_a_mixtral_config_leaves_out() -> None:
    absent = ("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "sliding_window")
    spec = parse(without(MIXTRAL, *absent, "max_position_embeddings") | {"num_attention_heads": 16})
    assert (spec.num_kv_heads, spec.rms_norm_eps, spec.rope_theta) == (8, 1e-5, 1e6)
    assert spec.max_position_embeddings == 131072
    assert spec.moe is not None
    assert (spec.moe.num_experts, spec.moe.top_k) == (8, 2)


def test_a_window_that_no_position_leaves_is_no_window() -> None:
    assert parse(MIXTRAL | {"sliding_window": 512}) == parse(MIXTRAL)


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
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures", ", ".join(SUPPORTED_ARCHITECTURES)),
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
        ({"n_shared_experts": 1}, "n_shared_experts", "0"),
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


@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"sliding_window": 511}, "sliding_window", "at least max_position_embeddings (512)"),
        ({"sliding_window": "none"}, "sliding_window", "whole number"),
        ({"attention_bias": True}, "attention_bias", "false"),
        ({"n_shared_experts": 1}, "n_shared_experts", "0"),
        ({"num_local_experts": 0}, "num_local_experts", "1 to 8192"),
        ({"num_local_experts": 10_000}, "num_local_experts", "1 to 8192"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok", "1 to num_local_experts (4)"),
        ({"intermediate_size": None}, "intermediate_size", "whole number"),
    ],
)
def test_impossible_settings_of_mixtral_are_refused(change: dict[str, Any], field: str, valid: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(MIXTRAL | change)
    assert caught.value.field == field
    assert valid in caught.value.info.valid


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, MOE, MIXTRAL])
def test_a_quantized_model_is_refused_unless_its_shape_alone_is_asked_for(
    config: dict[str, Any], tmp_path: Path
) -> None:
    quantized = config | {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(InvalidConfig) as caught:
        ModelSpec.from_config(quantized, "somewhere")
    assert caught.value.field == "quantization_config"
    assert caught.value.text.startswith("somewhere: ")
    assert ModelSpec.from_config(quantized, "somewhere", allow_quantized=True) == parse(config)
    with pytest.raises(InvalidConfig, match="quantization_config"):
        read(tmp_path, quantized)
    assert ModelSpec.from_folder(tmp_path, allow_quantized=True) == parse(config)


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


def test_a_pipe_in_place_of_a_config_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InvalidConfig, match="a regular file"):
        ModelSpec.from_folder(tmp_path)
