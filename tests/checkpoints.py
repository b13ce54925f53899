"""Small random checkpoints of every supported architecture, written by transformers in the Hugging Face format.

Weights are drawn wide enough that greedy choices are not ties, and norms and biases are random too, so that a model
that ignores one of them is found out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 256
WIDE_VOCAB_SIZE = 250
"""Of the wide checkpoints: no multiple of 4."""
MAX_POSITIONS = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
# Latent attention, an epsilon that differs from the one of the latents' norms, one dense layer before the experts.
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": False,
}
# Seven layers, so that three stages are uneven; heads and widths divide by 4, the vocabulary does not.
_WIDE: dict[str, Any] = {
    "vocab_size": WIDE_VOCAB_SIZE,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_WIDE_DEEPSEEK: dict[str, Any] = _WIDE | {"num_key_value_heads": 8}


def _qwen3_moe(**changes: Any) -> torch.nn.Module:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(_COMMON | experts | changes)))


def _qwen3(**changes: Any) -> torch.nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**(_COMMON | changes)))


def _llama(**changes: Any) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**(_COMMON | changes)))


def _qwen2(**changes: Any) -> torch.nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**(_COMMON | changes)))


def _mixtral(**changes: Any) -> torch.nn.Module:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    return MixtralForCausalLM(MixtralConfig(**(_COMMON | experts | changes)))


def _deepseek_v2(**changes: Any) -> torch.nn.Module:
    config = DeepseekV2Config(**(_COMMON | _DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2} | changes))
    return DeepseekV2ForCausalLM(config)


def _deepseek_v3(**changes: Any) -> torch.nn.Module:
    own = {"q_lora_rank": 24, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
    merged = _COMMON | _DEEPSEEK | own | changes
    # transformers would take a head_dim of None for one.
    del merged["head_dim"]
    return DeepseekV3ForCausalLM(DeepseekV3Config(**merged))


class _Recipe(NamedTuple):
    """``options``: of save_pretrained. ``old_keys``: config.json is rewritten in the key style of transformers 4."""

    build: Callable[[], torch.nn.Module]
    options: dict[str, Any]
    old_keys: bool


_GROUPS_V2: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
}

# The place of a recipe is its seed: append only.
_RECIPES: dict[str, _Recipe] = {
    "qwen3-moe": _Recipe(lambda: _qwen3_moe(tie_word_embeddings=False), {"max_shard_size": "200KB"}, False),
    "qwen3-moe-mixed-layers": _Recipe(
        lambda: _qwen3_moe(
            tie_word_embeddings=True, mlp_only_layers=[1], norm_topk_prob=False, num_experts=6, num_experts_per_tok=3
        ),
        {},
        True,
    ),
    "qwen3": _Recipe(lambda: _qwen3(tie_word_embeddings=True), {}, False),
    "qwen3-linear-rope": _Recipe(
        lambda: _qwen3(
            tie_word_embeddings=False,
            attention_bias=True,
            num_key_value_heads=4,
            rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        ),
        {"max_shard_size": "100KB"},
        True,
    ),
    "llama": _Recipe(
        lambda: _llama(tie_word_embeddings=False, num_key_value_heads=1, rope_parameters=_LLAMA3_ROPE),
        {"max_shard_size": "100KB"},
        False,
    ),
    "llama-tied": _Recipe(
        lambda: _llama(tie_word_embeddings=True, attention_bias=True, rope_parameters=_LLAMA3_ROPE),
        {},
        True,
    ),
    "qwen2": _Recipe(lambda: _qwen2(tie_word_embeddings=True), {}, True),
    "mixtral": _Recipe(lambda: _mixtral(), {"max_shard_size": "200KB"}, False),
    "deepseek-v2": _Recipe(lambda: _deepseek_v2(**_GROUPS_V2, rope_parameters=_YARN_ROPE), {}, True),
    "deepseek-v2-lite": _Recipe(lambda: _deepseek_v2(topk_method="greedy", attention_bias=True), {}, False),
    "deepseek-v3": _Recipe(
        lambda: _deepseek_v3(num_hidden_layers=4, rope_parameters=_YARN_ROPE), {"max_shard_size": "200KB"}, True
    ),
    "llama-wide": _Recipe(
        lambda: _llama(**_WIDE, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE),
        {"max_shard_size": "200KB"},
        False,
    ),
    "llama-kv2": _Recipe(
        lambda: _llama(**(_WIDE | {"num_key_value_heads": 2}), tie_word_embeddings=True, attention_bias=True), {}, True
    ),
    "qwen2-wide": _Recipe(lambda: _qwen2(**_WIDE, tie_word_embeddings=False), {}, False),
    "qwen3-wide": _Recipe(lambda: _qwen3(**_WIDE, tie_word_embeddings=True), {}, False),
    "qwen3-moe-wide": _Recipe(
        lambda: _qwen3_moe(**_WIDE, tie_word_embeddings=False), {"max_shard_size": "500KB"}, False
    ),
    "qwen3-moe-kv2": _Recipe(
        lambda: _qwen3_moe(
            **(_WIDE | {"num_key_value_heads": 2}), tie_word_embeddings=True, attention_bias=True, mlp_only_layers=[2]
        ),
        {},
        False,
    ),
    "mixtral-wide": _Recipe(lambda: _mixtral(**_WIDE), {}, True),
    "deepseek-v2-wide": _Recipe(
        lambda: _deepseek_v2(**_WIDE_DEEPSEEK, **_GROUPS_V2, q_lora_rank=24, attention_bias=True), {}, False
    ),
    "deepseek-v3-wide": _Recipe(
        lambda: _deepseek_v3(**_WIDE_DEEPSEEK, rope_parameters=_YARN_ROPE), {"max_shard_size": "500KB"}, False
    ),
}

ALL_CHECKPOINTS = tuple(_RECIPES)
CHECKPOINTS = ALL_CHECKPOINTS[:6]
"""Of three layers, for one rank and for experts over ranks: Llama, Qwen3 and Qwen3-MoE."""
MORE_CHECKPOINTS = ALL_CHECKPOINTS[6:11]
"""The same of Qwen2, Mixtral and DeepSeek-V2 and V3."""
WIDE_CHECKPOINTS = ALL_CHECKPOINTS[11:]
"""Of seven layers, to be cut: tensor parallel by 2 and 4, pipelines of 2 and 3 stages."""
MOE_CHECKPOINTS = tuple(name for name in CHECKPOINTS if "moe" in name)


class Checkpoints:
    """Folders of checkpoints by name, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        folder = self._root / name
        if not folder.exists():
            make_checkpoint(folder, name)
        return folder


def make_checkpoint(folder: Path, name: str) -> None:
    """Write checkpoint ``name``, one of ``ALL_CHECKPOINTS``, into ``folder``: the same one every time."""
    build, options, old_keys = _RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ALL_CHECKPOINTS.index(name))
        model = build()
        for key, parameter in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                torch.nn.init.uniform_(buffer, -0.2, 0.2)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    if old_keys:
        _rewrite_config(folder / "config.json")


def _rewrite_config(path: Path) -> None:
    """The same config as transformers 4 would have written it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    if config["model_type"].startswith("deepseek"):
        _write_as_deepseek(config)
    path.write_text(json.dumps(config, indent=2))


def _write_as_deepseek(config: dict[str, Any]) -> None:
    """The keys that DeepSeek's own configs have, and not those that transformers 5 adds."""
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    for key in ("head_dim", "qk_head_dim", "mlp_bias", "rope_interleave"):
        config.pop(key, None)
    v3 = config["model_type"] == "deepseek_v3"
    config |= {"moe_layer_freq": 1, "scoring_func": "sigmoid" if v3 else "softmax", "ep_size": 1, "seq_aux": True}
    if v3:
        config["topk_method"] = "noaux_tc"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoint folders, shared by the session. Import this fixture into a conftest.py to use it."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
