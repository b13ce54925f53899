from __future__ import annotations

import pytest

from drumline.engine.known_models import known_models, known_spec
from drumline.protocol.errors import InvalidConfig
from tests.parametercount import count_parameters

# Of the published checkpoints; of DeepSeek's V3 and R1 without the layer that predicts a second token.
PARAMETERS = {
    "deepseek-r1": 671_026_419_200,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
}


def test_every_known_model_is_counted_here() -> None:
    assert known_models() == tuple(sorted(PARAMETERS))


@pytest.mark.parametrize("name", known_models())
def test_a_known_model_has_the_parameters_it_is_published_with(name: str) -> None:
    spec = known_spec(name)
    assert count_parameters(spec) == PARAMETERS[name]
    assert spec.dtype == "bfloat16"


def test_names_are_found_in_any_case() -> None:
    assert known_spec("DeepSeek-V3") == known_spec("deepseek-v3")


@pytest.mark.parametrize("name", ["gpt-5", "", "../model_shapes/qwen3-8b", "qwen3-8b.json", "*"])
def test_an_unknown_name_is_answered_with_what_there_is(name: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        known_spec(name)
    assert caught.value.field == "model"
    assert all(known in caught.value.info.valid for known in known_models())


def test_what_deepseek_v3_caches_and_routes() -> None:
    spec = known_spec("deepseek-v3")
    assert spec.mla is not None
    assert spec.moe is not None
    assert spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim == 576
    assert (len(spec.moe_layers), spec.num_experts, spec.moe.num_groups) == (58, 256, 8)
    # Both mscales are 1: cosines stay as they are, the softmax is scaled.
    assert spec.rope_scaling.attention_factor == 1.0
    assert spec.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-9)
