"""Small random checkpoints of every supported architecture, written by transformers in the Hugging Face format.

Weights are drawn wide enough that greedy choices are not ties, and norms and biases are random too, so that a model
that ignores one of them is found out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 256
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


def _qwen3_moe(**changes: Any) -> torch.nn.Module:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(_COMMON | experts | changes)))


def _qwen3(**changes: Any) -> torch.nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**(_COMMON | changes)))


def _llama(**changes: Any) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**(_COMMON | changes)))


# name: (model, options of save_pretrained, whether config.json is rewritten in the key style of transformers 4)
_RECIPES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], bool]] = {
    "qwen3-moe": (lambda: _qwen3_moe(tie_word_embeddings=False), {"max_shard_size": "200KB"}, False),
    "qwen3-moe-mixed-layers": (
        lambda: _qwen3_moe(
            tie_word_embeddings=True, mlp_only_layers=[1], norm_topk_prob=False, num_experts=6, num_experts_per_tok=3
        ),
        {},
        True,
    ),
    "qwen3": (lambda: _qwen3(tie_word_embeddings=True), {}, False),
    "qwen3-linear-rope": (
        lambda: _qwen3(
            tie_word_embeddings=False,
            attention_bias=True,
            num_key_value_heads=4,
            rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        ),
        {"max_shard_size": "100KB"},
        True,
    ),
    "llama": (
        lambda: _llama(tie_word_embeddings=False, num_key_value_heads=1, rope_parameters=_LLAMA3_ROPE),
        {"max_shard_size": "100KB"},
        False,
    ),
    "llama-tied": (
        lambda: _llama(tie_word_embeddings=True, attention_bias=True, rope_parameters=_LLAMA3_ROPE),
        {},
        True,
    ),
}

CHECKPOINTS = tuple(_RECIPES)
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
    """Write checkpoint ``name``, one of ``CHECKPOINTS``, into ``folder``: the same one every time."""
    build, options, old_keys = _RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CHECKPOINTS.index(name))
        model = build()
        for key, parameter in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
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
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoint folders, shared by the session. Import this fixture into a conftest.py to use it."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
