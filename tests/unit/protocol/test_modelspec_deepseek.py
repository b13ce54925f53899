from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import MlaSpec, ModelSpec, MoeSpec, RopeScaling
from tests.unit.protocol.modelconfigs import DEEPSEEK_V2, DEEPSEEK_V3, parse, read, without

BOTH = pytest.mark.parametrize("config", [DEEPSEEK_V2, DEEPSEEK_V3])


def moe_of(config: dict[str, Any]) -> MoeSpec:
    moe = parse(config).moe
    assert moe is not None
    return moe


def test_a_deepseek_v3_folder_of_transformers_4(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    spec = read(
        tmp_path, DEEPSEEK_V3 | {"rope_scaling": scaling | {"original_max_position_embeddings": 128}, "rope_theta": 500}
    )
    assert spec == ModelSpec(
        architecture="DeepseekV3ForCausalLM",
        num_layers=4,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=1,
        head_dim=24,
        intermediate_size=128,
        vocab_size=1000,
        rms_norm_eps=1e-05,
        rope_theta=500.0,
        rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=128),
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm=False,
        max_position_embeddings=512,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="float32",
        moe=MoeSpec(
            num_experts=16,
            top_k=4,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            layers=(1, 2, 3),
            shared_intermediate_size=48,
            scoring="sigmoid",
            topk_method="noaux_tc",
            num_groups=4,
            topk_groups=2,
            routed_scaling_factor=2.5,
        ),
        attention_output_bias=False,
        mla=MlaSpec(q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12),
        rope_interleaved=True,
        softmax_scale=spec.softmax_scale,
    )
    assert spec.rotary_dim == 8


def test_a_deepseek_v2_chooses_from_the_groups_with_the_best_expert() -> None:
    assert moe_of(DEEPSEEK_V2) == MoeSpec(
        num_experts=16,
        top_k=4,
        moe_intermediate_size=48,
        norm_topk_prob=False,
        layers=(1, 2, 3),
        shared_intermediate_size=96,
        scoring="softmax",
        topk_method="group_limited_greedy",
        num_groups=8,
        topk_groups=3,
        routed_scaling_factor=16.0,
    )


def test_a_greedy_deepseek_v2_has_no_groups_whatever_its_config_says() -> None:
    greedy = moe_of(DEEPSEEK_V2 | {"topk_method": "greedy", "n_group": 5, "topk_group": None})
    assert (greedy.topk_method, greedy.num_groups, greedy.topk_groups) == ("greedy", 1, 1)
    assert greedy == moe_of(without(DEEPSEEK_V2, "topk_method"))


@BOTH
def test_queries_are_projected_directly_only_when_the_config_says_null(config: dict[str, Any]) -> None:
    for given, expected in ((24, 24), (None, 0)):
        spec = parse(config | {"q_lora_rank": given})
        assert spec.mla is not None
        assert spec.mla.q_lora_rank == expected
    spec = parse(without(config, "q_lora_rank"))
    assert spec.mla is not None
    assert spec.mla.q_lora_rank == 1536


@BOTH
def test_the_keys_that_transformers_5_adds_change_nothing(config: dict[str, Any]) -> None:
    added = {"head_dim": 8, "qk_head_dim": 24, "rope_interleave": True, "mlp_bias": False, "pretraining_tp": 1}
    assert parse(config | added) == parse(config)
    renamed = without(config, "n_routed_experts") | {"num_local_experts": 16}
    assert parse(renamed) == parse(config)


@BOTH
def test_an_attention_bias_is_one_of_the_output_too(config: dict[str, Any]) -> None:
    spec = parse(config | {"attention_bias": True})
    assert (spec.attention_bias, spec.attention_output_bias) == (True, True)


def test_deepseek_v3_may_rotate_by_halves() -> None:
    assert not parse(DEEPSEEK_V3 | {"rope_interleave": False}).rope_interleaved
    assert parse(DEEPSEEK_V2).rope_interleaved


def test_what_a_deepseek_config_leaves_out() -> None:
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "num_key_value_heads")
    experts = ("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "routed_scaling_factor")
    groups = ("n_group", "topk_group", "topk_method", "norm_topk_prob", "scoring_func", "moe_layer_freq")
    absent = (*sizes, *experts, *groups, "first_k_dense_replace", "max_position_embeddings", "rms_norm_eps")
    v2 = parse(without(DEEPSEEK_V2, *absent))
    v3 = parse(without(DEEPSEEK_V3, *absent, "num_experts_per_tok"))
    for spec in (v2, v3):
        assert spec.mla == MlaSpec(1536, 512, 128, 64, 128)
        assert (spec.head_dim, spec.rotary_dim, spec.rms_norm_eps) == (192, 64, 1e-6)
    assert (v2.max_position_embeddings, v3.max_position_embeddings) == (2048, 4096)
    assert v2.moe == MoeSpec(64, 4, 1407, False, (0, 1, 2, 3), 2814)
    assert v3.moe == MoeSpec(256, 8, 2048, True, (3,), 2048, "sigmoid", "noaux_tc", 8, 4, 2.5)


@BOTH
@pytest.mark.parametrize(
    ("dense", "expected"), [(0, (0, 1, 2, 3)), (3, (3,)), (4, ()), (61, ())], ids=["none", "three", "all", "more"]
)
def test_the_first_layers_are_dense(config: dict[str, Any], dense: int, expected: tuple[int, ...]) -> None:
    assert parse(config | {"first_k_dense_replace": dense}).moe_layers == expected


@BOTH
def test_a_model_may_have_no_shared_expert(config: dict[str, Any]) -> None:
    assert moe_of(config | {"n_shared_experts": 0}).shared_intermediate_size == 0


@BOTH
@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads", "num_attention_heads (4)"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim", "even"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim", "2 to"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim", "1 to"),
        ({"v_head_dim": -1}, "v_head_dim", "1 to"),
        ({"kv_lora_rank": 0}, "kv_lora_rank", "1 to"),
        ({"q_lora_rank": 0}, "q_lora_rank", "1 to"),
        ({"q_lora_rank": "24"}, "q_lora_rank", "whole number"),
        ({"head_dim": 24}, "head_dim", "qk_rope_head_dim (8)"),
        ({"attention_bias": "no"}, "attention_bias", "true or false"),
        ({"mlp_bias": True}, "mlp_bias", "false"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"moe_layer_freq": 2}, "moe_layer_freq", "1"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace", "0 to"),
        ({"n_routed_experts": 0}, "n_routed_experts", "1 to 8192"),
        ({"n_routed_experts": 10_000}, "n_routed_experts", "1 to 8192"),
        ({"n_shared_experts": None}, "n_shared_experts", "0: no shared expert"),
        ({"n_shared_experts": -1}, "n_shared_experts", "0 to"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size", "1 to"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok", "1 to n_routed_experts (16)"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor", "above 0"),
        ({"n_group": 3}, "n_group", "a divisor of the number of experts (16)"),
        ({"n_group": 0}, "n_group", "1 to"),
        ({"n_group": 2, "topk_group": 3}, "topk_group", "1 to n_group (2)"),
        ({"topk_group": 1, "num_experts_per_tok": 5}, "num_experts_per_tok", "the experts of topk_group (1)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "absent"),
    ],
)
def test_what_is_not_implemented_or_not_possible_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], field: str, valid: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(config | change)
    assert caught.value.field == field
    assert valid in caught.value.info.valid


@pytest.mark.parametrize(
    ("config", "change", "field", "valid"),
    [
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob", "false"),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func", "softmax"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method", "greedy, group_limited_greedy"),
        (DEEPSEEK_V2, {"rope_interleave": False}, "rope_interleave", "true"),
        (DEEPSEEK_V2, {"n_group": None}, "n_group", "whole number"),
        (DEEPSEEK_V2, {"topk_group": None}, "topk_group", "whole number"),
        (DEEPSEEK_V2, {"num_experts_per_tok": None}, "num_experts_per_tok", "whole number"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func", "sigmoid"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method", "noaux_tc"),
        (DEEPSEEK_V3, {"rope_interleave": 1}, "rope_interleave", "true or false"),
        (DEEPSEEK_V3, {"norm_topk_prob": "yes"}, "norm_topk_prob", "true or false"),
        # The rank of a group is the sum of its two best.
        (DEEPSEEK_V3, {"n_group": 16}, "n_group", "1 to 8"),
    ],
)
def test_what_only_one_of_the_two_refuses(
    config: dict[str, Any], change: dict[str, Any], field: str, valid: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(config | change)
    assert caught.value.field == field
    assert valid in caught.value.info.valid


@BOTH
def test_the_shape_of_a_quantized_model_can_be_asked_for(config: dict[str, Any]) -> None:
    quantized = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert ModelSpec.from_config(quantized, "config.json", allow_quantized=True) == parse(config)
