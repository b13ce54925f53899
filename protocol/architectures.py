"""What sets one supported architecture apart from another, where a config says nothing of it.

The values are the defaults of transformers' configuration classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drumline.protocol.configfields import ConfigFields
from drumline.protocol.moespec import MoeSpec, read_deepseek_v2, read_deepseek_v3, read_mixtral, read_qwen3_moe

# Keys that other architectures use and that transformers or a fork of it would act on: the neutral value is accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "num_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "mlp_bias": (None, False),
    "is_encoder_decoder": (None, False),
    "compression_config": (None,),
}
_NO_SHARED_EXPERTS: dict[str, tuple[Any, ...]] = {"n_shared_experts": (None, 0)}
_UNQUANTIZED: dict[str, tuple[Any, ...]] = {"quantization_config": (None,)}


def _no_experts(fields: ConfigFields, num_layers: int) -> None:
    return None


@dataclass(frozen=True)
class Architecture:
    """Facts and defaults. ``qkv_bias``: queries, keys and values have a bias and the output has none, whatever the
    config says; otherwise its ``attention_bias`` decides for all of them.

    ``head_dim``: 0 means hidden_size / num_attention_heads. ``num_kv_heads``: 0 means as many as query heads.
    ``windowed``: a ``sliding_window`` in the config is used whatever else it says. ``neutral``: the values that a key
    may have here, beside what all architectures ask.
    """

    max_position_embeddings: int
    read_moe: Callable[[ConfigFields, int], MoeSpec | None] = _no_experts
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int = 0
    num_kv_heads: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    windowed: bool = False
    mla: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _NO_SHARED_EXPERTS)


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(max_position_embeddings=2048),
    "Qwen2ForCausalLM": Architecture(max_position_embeddings=32768, qkv_bias=True, num_kv_heads=32),
    "Qwen3ForCausalLM": Architecture(max_position_embeddings=32768, qk_norm=True, head_dim=128, num_kv_heads=32),
    "Qwen3MoeForCausalLM": Architecture(
        max_position_embeddings=32768, read_moe=read_qwen3_moe, qk_norm=True, num_kv_heads=4
    ),
    "MixtralForCausalLM": Architecture(
        max_position_embeddings=131072,
        read_moe=read_mixtral,
        num_kv_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        windowed=True,
        neutral=_NO_SHARED_EXPERTS | {"attention_bias": (None, False)},
    ),
    "DeepseekV2ForCausalLM": Architecture(
        max_position_embeddings=2048,
        read_moe=read_deepseek_v2,
        mla=True,
        neutral={
            # DeepSeek's own code would normalise, transformers would not.
            "norm_topk_prob": (None, False),
            "scoring_func": (None, "softmax"),
            "moe_layer_freq": (None, 1),
            "rope_interleave": (None, True),
        },
    ),
    "DeepseekV3ForCausalLM": Architecture(
        max_position_embeddings=4096,
        read_moe=read_deepseek_v3,
        mla=True,
        neutral={
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
        },
    ),
}


def read_architecture(fields: ConfigFields) -> tuple[str, Architecture]:
    """The one entry of ``architectures``. Raises InvalidConfig when it is not supported."""
    found = fields.raw("architectures")
    valid = "one of " + ", ".join(ARCHITECTURES)
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise fields.invalid("architectures", found, f"a list with {valid}")
    if found[0] not in ARCHITECTURES:
        raise fields.invalid("architectures", found[0], valid)
    return found[0], ARCHITECTURES[found[0]]


def refuse_unimplemented(fields: ConfigFields, architecture: Architecture, *, allow_quantized: bool) -> None:
    """Refuse keys that would change the arithmetic. Raises InvalidConfig for the first."""
    act = fields.raw("hidden_act")
    if act is not None and act not in ("silu", "swish"):
        raise fields.invalid("hidden_act", act, "silu")
    asked = _NEUTRAL | ({} if allow_quantized else _UNQUANTIZED) | dict(architecture.neutral)
    for name, neutral in asked.items():
        value = fields.raw(name)
        if not any(value is n or (type(value) is type(n) and value == n) for n in neutral):
            accepted = ", ".join("absent" if n is None else json.dumps(n) for n in neutral)
            raise fields.invalid(name, value, f"{accepted} (nothing else is implemented)")


def refuse_sliding_window(
    fields: ConfigFields, architecture: Architecture, *, num_layers: int, max_positions: int
) -> None:
    """Refuse windows that are in use. A ``sliding_window`` beside ``use_sliding_window: false`` means nothing, except
    to Mixtral; there one that no position can leave means nothing. Raises InvalidConfig."""
    if architecture.windowed:
        window = fields.integer("sliding_window", minimum=1, default=max_positions)
        if window < max_positions:
            valid = f"absent, or at least max_position_embeddings ({max_positions})"
            raise fields.invalid("sliding_window", window, f"{valid}: sliding window attention is not implemented")
    used = fields.boolean("use_sliding_window", default=False)
    if used and not architecture.windowed and fields.raw("sliding_window") is not None:
        raise fields.invalid("use_sliding_window", True, "false (sliding window attention is not implemented)")
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.invalid("layer_types", layer_types, f"a list of num_hidden_layers ({num_layers}) names")
    for kind in layer_types:
        if kind != "full_attention":
            raise fields.invalid("layer_types", kind, "full_attention for every layer")
