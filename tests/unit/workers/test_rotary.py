"""Rotation against its definition and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from drumline.protocol.configfields import ConfigFields
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import RopeScaling
from drumline.protocol.rope import read_rope
from drumline.workers.layers import RotaryEmbedding
from drumline.workers.layers.rotary import inverse_frequencies

CPU = torch.device("cpu")


def test_rotation_turns_channel_pairs_by_position() -> None:
    rotary = RotaryEmbedding(4, 100.0, RopeScaling(), 50, CPU)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    found = rotary.rotate(x, rotary.at(torch.tensor([7])))[0, 0]
    for pair, frequency in ((0, 1.0), (1, 0.1)):
        cos, sin = math.cos(7 * frequency), math.sin(7 * frequency)
        a, b = float(x[0, 0, pair]), float(x[0, 0, pair + 2])
        assert float(found[pair]) == pytest.approx(a * cos - b * sin, abs=1e-6)
        assert float(found[pair + 2]) == pytest.approx(b * cos + a * sin, abs=1e-6)


def test_llama3_scaling_slows_long_waves_keeps_short_ones_and_passes_between() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 1000)
    plain = inverse_frequencies(64, 10000.0, RopeScaling())
    scaled = inverse_frequencies(64, 10000.0, scaling)
    wavelengths = 2 * math.pi / plain
    ratio = scaled / plain
    assert bool((ratio[wavelengths < 250] == 1).all())
    assert torch.allclose(ratio[wavelengths > 1000], torch.tensor(1 / 8))
    between = ratio[(wavelengths > 250) & (wavelengths < 1000)]
    assert len(between) > 0
    assert bool(((between > 1 / 8) & (between < 1)).all())
    assert bool((between.diff() < 0).all())


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="longrope"):
        inverse_frequencies(8, 10000.0, RopeScaling("longrope"))


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 96, "truncate": False},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 96, "attention_factor": 1.25},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}")
def test_scaled_frequencies_and_their_factor_are_those_of_transformers(rope: dict[str, Any]) -> None:
    rope = {"rope_theta": 500.0} | rope
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=1024, rope_parameters=dict(rope)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, CPU)
    read = read_rope(ConfigFields({"rope_parameters": rope}, "config"), default_theta=1.0, max_positions=1024)
    torch.testing.assert_close(inverse_frequencies(32, read.theta, read.scaling), expected, rtol=1e-6, atol=0)
    assert read.scaling.attention_factor == pytest.approx(factor)


def test_rotated_halves_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    rotary = RotaryEmbedding(
        16, 500.0, RopeScaling("yarn", 4.0, attention_factor=1.3, original_max_position_embeddings=64), 80, CPU
    )
    q, positions = torch.randn(7, 3, 16), torch.tensor([0, 1, 2, 50, 79, 3, 3])
    cos, sin = rotary.at(positions)
    # transformers has the sign in its rotation, drumline in the table.
    plain = torch.cat([-sin[..., :8], sin[..., 8:]], dim=-1)
    expected, _ = apply_rotary_pos_emb(q, q, cos[:, 0], plain[:, 0], unsqueeze_dim=1)
    torch.testing.assert_close(rotary.rotate(q, (cos, sin)), expected, rtol=1e-6, atol=1e-6)
    assert float(cos[0].max()) == pytest.approx(1.3)


def test_interleaved_pairs_have_the_products_of_transformers() -> None:
    torch.manual_seed(1)
    rotary = RotaryEmbedding(8, 500.0, RopeScaling(), 60, CPU, interleaved=True)
    q, k, positions = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.arange(0, 54, 6)
    angles = torch.outer(positions.float(), inverse_frequencies(8, 500.0, RopeScaling())).repeat(1, 2)
    config = DeepseekV3Config()
    assert config.rope_interleave
    rotate: Any = apply_rotary_pos_emb_interleave
    their_q, their_k = rotate(q, k, angles.cos()[None], angles.sin()[None])
    tables = rotary.at(positions)
    our_q = rotary.rotate(q[0].transpose(0, 1), tables)
    our_k = rotary.rotate(k[0].transpose(0, 1), tables)
    expected = torch.einsum("hqd,kd->hqk", their_q[0], their_k[0, 0])
    found = torch.einsum("qhd,kd->hqk", our_q, our_k[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Even channels turn with the one after them: channel 0 and 1 of a head are the first pair.
    alone = torch.zeros(1, 1, 8)
    alone[..., 0] = 1.0
    turned = rotary.rotate(alone, rotary.at(torch.tensor([5])))[0, 0]
    assert sorted(turned.nonzero().view(-1).tolist()) == [0, 4]


@pytest.mark.parametrize("interleaved", [False, True])
def test_bfloat16_is_rotated_in_float32_and_rounded_once(interleaved: bool) -> None:
    torch.manual_seed(2)
    rotary = RotaryEmbedding(16, 10000.0, RopeScaling(), 3000, CPU, interleaved=interleaved)
    x, tables = torch.randn(5, 2, 16).bfloat16(), rotary.at(torch.tensor([0, 1, 999, 2000, 2999]))
    found = rotary.rotate(x, tables)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotary.rotate(x.float(), tables).bfloat16())
