from __future__ import annotations

import math
from typing import Any

import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import RopeScaling
from tests.unit.protocol.modelconfigs import DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, MIXTRAL, QWEN2, QWEN3, parse

YARN: dict[str, Any] = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 128}
LINEAR: dict[str, Any] = {"type": "linear", "factor": 2}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def scaled(config: dict[str, Any], scaling: dict[str, Any], **changes: Any) -> RopeScaling:
    return parse(config | {"rope_scaling": scaling | changes}).rope_scaling


def test_linear_scaling_and_default_rope() -> None:
    spec = parse(LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2}})
    assert spec.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert spec.rope_theta == 10000.0
    assert parse(LLAMA | {"rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0
    assert parse(MIXTRAL | {"rope_parameters": {"rope_type": "default"}}).rope_theta == 1e6
    assert parse(MIXTRAL | {"rope_theta": 5.0}).rope_theta == 5.0


def test_yarn_of_qwen() -> None:
    for config in (LLAMA, QWEN2, QWEN3, MIXTRAL):
        found = scaled(config, YARN, factor=4)
        assert found == RopeScaling(
            kind="yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=0.1 * math.log(4) + 1
        )
        assert (found.beta_fast, found.beta_slow, found.truncate) == (32.0, 1.0, True)


def test_yarn_in_both_key_styles() -> None:
    own = {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}
    old = parse(LLAMA | {"rope_theta": 500, "rope_scaling": YARN | own})
    new = {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn", "rope_theta": 500} | own
    assert old == parse(LLAMA | {"rope_parameters": new})
    assert old.rope_scaling == RopeScaling(
        kind="yarn",
        factor=40.0,
        original_max_position_embeddings=128,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
        truncate=False,
    )


@pytest.mark.parametrize(
    ("mscales", "expected"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0}, 0.1 * math.log(40) + 1),
        ({"mscale": 0, "mscale_all_dim": 1}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_the_factor_on_cosines_and_sines_follows_from_the_two_mscales(mscales: dict[str, Any], expected: float) -> None:
    assert scaled(DEEPSEEK_V3, YARN, **mscales).attention_factor == pytest.approx(expected, rel=1e-12)


def test_a_length_beside_the_rope_keys_goes_before_the_one_within() -> None:
    for scaling in (YARN, LLAMA3 | {"original_max_position_embeddings": 128}):
        spec = parse(LLAMA | {"rope_scaling": scaling, "original_max_position_embeddings": 64})
        assert spec.rope_scaling.original_max_position_embeddings == 64
        assert scaled(LLAMA, scaling, original_max_position_embeddings=None).original_max_position_embeddings == 512


@pytest.mark.parametrize("config", [DEEPSEEK_V2, DEEPSEEK_V3])
@pytest.mark.parametrize("kind", [YARN, LINEAR, LLAMA3])
def test_the_softmax_of_latent_attention_is_scaled_with_the_context(
    config: dict[str, Any], kind: dict[str, Any]
) -> None:
    plain = parse(config)
    assert plain.softmax_scale == 0.0
    assert parse(config | {"rope_scaling": kind | {"mscale": 0.7}}).softmax_scale == 0.0
    spec = parse(config | {"rope_scaling": kind | {"mscale_all_dim": 0.5}})
    expected = 24**-0.5 * (0.05 * math.log(kind["factor"]) + 1) ** 2
    assert spec.softmax_scale == pytest.approx(expected, rel=1e-12)
    assert parse(config | {"rope_scaling": kind | {"mscale_all_dim": 0.5, "factor": 0.5}}).softmax_scale == 24**-0.5


def test_other_attention_is_not() -> None:
    assert parse(QWEN3 | {"rope_scaling": YARN | {"mscale_all_dim": 0.5}}).softmax_scale == 0.0


@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_scaling.rope_type", "default, linear, llama3"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.rope_type", "linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor", "above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling", "object"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "rope_parameters.high_freq_factor", "more than"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor", "1.0"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope_parameters.rope_type", "default"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters.full_attention", "absent"),
        ({"rope_theta": 0}, "rope_theta", "above 0"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_scaling.rope_theta", "above 1"),
        ({"rope_scaling": YARN | {"factor": None}}, "rope_scaling.factor", "number"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "rope_scaling.beta_fast", "above 0"),
        ({"rope_scaling": YARN | {"beta_fast": 2, "beta_slow": 3}}, "rope_scaling.beta_fast", "beta_slow (3.0)"),
        ({"rope_scaling": YARN | {"beta_slow": "1"}}, "rope_scaling.beta_slow", "number"),
        ({"rope_scaling": YARN | {"attention_factor": -1}}, "rope_scaling.attention_factor", "above 0"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate", "true or false"),
        ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale", "0 to 1000"),
        ({"rope_scaling": YARN | {"mscale": True}}, "rope_scaling.mscale", "0 to 1000"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 1e200}}, "rope_scaling.mscale_all_dim", "0 to 1000"),
        ({"rope_scaling": LINEAR | {"mscale_all_dim": float("nan")}}, "rope_scaling.mscale_all_dim", "0 to 1000"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "rope_scaling.original_max_position_embeddings",
            "1 to",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 0.5},
            "original_max_position_embeddings",
            "whole number",
        ),
    ],
)
def test_impossible_rotations_are_refused_by_name(change: dict[str, Any], field: str, valid: str) -> None:
    for config in (QWEN3, DEEPSEEK_V3):
        with pytest.raises(InvalidConfig) as caught:
            parse(config | change)
        assert caught.value.field == field
        assert valid in caught.value.info.valid
