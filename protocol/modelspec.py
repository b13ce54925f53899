"""The shape of a model as its Hugging Face folder states it, read without torch.

Both key styles are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``num_experts``, ``torch_dtype``) and
transformers 5 (``rope_parameters``, ``num_local_experts``, ``dtype``). What a config leaves out has the value that
transformers gives it for that architecture. Whatever would change the arithmetic and is not implemented is refused by
name, so that no model is ever served almost right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from drumline.protocol.configfields import ConfigFields
from drumline.protocol.errors import InvalidConfig

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
MAX_CONFIG_BYTES = 16 << 20
# What is larger is a mistake, and would cost memory before any check of the checkpoint could find it.
MAX_LAYERS = 4096
MAX_EXPERTS = 8192
MAX_POSITIONS = 1 << 24

_DTYPES = ("float32", "bfloat16", "float16")

# Keys that other architectures use and that transformers or a fork of it would act on: the neutral value is accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "mlp_bias": (None, False),
    "is_encoder_decoder": (None, False),
    "quantization_config": (None,),
    "compression_config": (None,),
}


class RopeScaling(msgspec.Struct, frozen=True):
    """How rotary frequencies are scaled. ``kind`` is default, linear (uses ``factor``), llama3 (and ``low_freq_factor``,
    ``high_freq_factor``, ``original_max_position_embeddings``) or yarn (and ``beta_fast``, ``beta_slow``, ``truncate``,
    ``original_max_position_embeddings``). ``attention_factor`` multiplies cos and sin; it is 1 unless kind is yarn."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


class MlaSpec(msgspec.Struct, frozen=True):
    """Multi-head latent attention. Sizes in channels; ``q_lora_rank`` 0: queries are projected directly."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class MoeSpec(msgspec.Struct, frozen=True):
    """The experts of a model; ``layers`` are the indices of the layers that have them, ascending."""

    num_experts: int
    top_k: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    layers: tuple[int, ...]
    shared_intermediate_size: int = 0
    scoring: str = "softmax"
    topk_method: str = "greedy"
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0


class ModelSpec(msgspec.Struct, frozen=True):
    """What the config of a model folder says, checked.

    ``intermediate_size`` is that of the dense layers. ``dtype`` is the one of the checkpoint: float32, bfloat16 or
    float16. ``bos_token_id`` is -1 when there is none. ``eos_token_ids`` come from generation_config.json, else from
    config.json, and may be empty. ``moe`` is None when no layer has experts.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int
    dtype: str
    moe: MoeSpec | None = None
    attention_output_bias: bool = False
    mla: MlaSpec | None = None
    rope_interleaved: bool = False
    softmax_scale: float = 0.0

    @property
    def rotary_dim(self) -> int:
        """Channels of a query head that rotate."""
        return self.mla.qk_rope_head_dim if self.mla is not None else self.head_dim

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.moe is not None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts; empty for a dense model."""
        return self.moe.layers if self.moe is not None else ()

    @property
    def num_experts(self) -> int:
        """Logical experts per MoE layer; 0 for a dense model."""
        return self.moe.num_experts if self.moe is not None else 0

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Read ``config.json`` (and ``generation_config.json`` when there is one) of ``folder``.

        Raises InvalidConfig, naming field, what was found and what would be valid.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InvalidConfig("model", str(folder), "an existing folder that holds config.json and safetensors files")
        fields = ConfigFields(_read_object(folder / "config.json"), folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = ConfigFields(_read_object(generation_path), generation_path) if generation_path.exists() else None
        return _read_spec(fields, generation)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise InvalidConfig(str(path), f"{size} bytes", f"at most {MAX_CONFIG_BYTES} bytes of JSON")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InvalidConfig("model", f"no {path.name} in {path.parent}", f"a folder with {path.name}") from None
    except OSError as error:
        raise InvalidConfig(str(path), str(error), "a readable file") from error
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(str(path), f"text that is not JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidConfig(str(path), f"JSON of type {type(value).__name__}", "a JSON object")
    return value


def _read_spec(fields: ConfigFields, generation: ConfigFields | None) -> ModelSpec:
    architecture = _architecture(fields)
    is_qwen = architecture != "LlamaForCausalLM"
    _refuse_unimplemented(fields)

    num_layers = fields.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)
    hidden_size = fields.integer("hidden_size", minimum=1)
    num_heads = fields.integer("num_attention_heads", minimum=1)
    num_kv_heads = fields.integer("num_key_value_heads", minimum=1, default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.invalid("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    # transformers gives a dense Qwen3 without head_dim 128 channels per head, the others their share of hidden_size.
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    head_dim = fields.integer("head_dim", minimum=2, default=default_head_dim)
    if head_dim % 2:
        raise fields.invalid("head_dim", head_dim, "an even number (rotary embeddings pair the channels)")
    vocab_size = fields.integer("vocab_size", minimum=1)
    context = 32768 if is_qwen else 2048
    max_positions = fields.integer("max_position_embeddings", minimum=1, maximum=MAX_POSITIONS, default=context)
    rope_theta, rope_scaling = _rope(fields, max_positions)
    _refuse_sliding_window(fields, num_layers)

    moe = _moe(fields, num_layers) if architecture == "Qwen3MoeForCausalLM" else None
    return ModelSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", minimum=1),
        vocab_size=vocab_size,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6, above=0.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=fields.boolean("attention_bias", default=False),
        qk_norm=is_qwen,
        max_position_embeddings=max_positions,
        eos_token_ids=_eos(fields, generation, vocab_size),
        bos_token_id=_bos(fields, vocab_size),
        dtype=_dtype(fields),
        moe=moe,
    )


def _architecture(fields: ConfigFields) -> str:
    found = fields.raw("architectures")
    valid = "one of " + ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise fields.invalid("architectures", found, f"a list with {valid}")
    if found[0] not in SUPPORTED_ARCHITECTURES:
        raise fields.invalid("architectures", found[0], valid)
    return found[0]


def _refuse_unimplemented(fields: ConfigFields) -> None:
    act = fields.raw("hidden_act")
    if act is not None and act not in ("silu", "swish"):
        raise fields.invalid("hidden_act", act, "silu")
    for name, neutral in _NEUTRAL.items():
        value = fields.raw(name)
        if not any(value is n or (type(value) is type(n) and value == n) for n in neutral):
            accepted = ", ".join("absent" if n is None else json.dumps(n) for n in neutral)
            raise fields.invalid(name, value, f"{accepted} (nothing else is implemented)")


def _refuse_sliding_window(fields: ConfigFields, num_layers: int) -> None:
    """Refuse windows that are in use. A ``sliding_window`` beside ``use_sliding_window: false`` means nothing."""
    used = fields.boolean("use_sliding_window", default=False)
    if used and fields.raw("sliding_window") is not None:
        raise fields.invalid("use_sliding_window", True, "false (sliding window attention is not implemented)")
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.invalid("layer_types", layer_types, f"a list of num_hidden_layers ({num_layers}) names")
    for kind in layer_types:
        if kind != "full_attention":
            raise fields.invalid("layer_types", kind, "full_attention for every layer")


def _rope(fields: ConfigFields, max_positions: int) -> tuple[float, RopeScaling]:
    """Rotary base and scaling. transformers 5 keeps both in ``rope_parameters``, 4 in two keys; scaling given in
    ``rope_scaling`` comes first there, and so it does here."""
    outer_theta = fields.number("rope_theta", default=10000.0, above=0.0)
    name = next((n for n in ("rope_scaling", "rope_parameters") if fields.raw(n)), None)
    if name is None:
        return outer_theta, RopeScaling()
    rope = fields.inside(name)
    theta = rope.number("rope_theta", default=outer_theta, above=0.0)
    partial = rope.raw("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise rope.invalid("partial_rotary_factor", partial, "absent or 1.0 (partial rotation is not implemented)")
    kind = rope.raw("rope_type") if rope.raw("rope_type") is not None else rope.raw("type")
    if kind is None and name == "rope_parameters":
        kind = "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        raise rope.invalid("rope_type", kind, "one of " + ", ".join(SUPPORTED_ROPE_TYPES))
    if kind == "default":
        return theta, RopeScaling()
    factor = rope.number("factor", above=0.0)
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    low = rope.number("low_freq_factor", above=0.0)
    high = rope.number("high_freq_factor", above=0.0)
    if high <= low:
        raise rope.invalid("high_freq_factor", high, f"more than low_freq_factor ({low})")
    original = rope.integer("original_max_position_embeddings", minimum=1, default=max_positions)
    return theta, RopeScaling("llama3", factor, low, high, original)


def _moe(fields: ConfigFields, num_layers: int) -> MoeSpec | None:
    name = "num_experts" if fields.raw("num_experts") is not None else "num_local_experts"
    num_experts = fields.integer(name, minimum=0, maximum=MAX_EXPERTS, default=128)
    sparse_step = fields.integer("decoder_sparse_step", minimum=1, default=1)
    mlp_only = fields.integers("mlp_only_layers", minimum=0, limit=num_layers, single=False) or ()
    # The rule of Qwen3MoeDecoderLayer in transformers.
    layers = tuple(i for i in range(num_layers) if i not in mlp_only and (i + 1) % sparse_step == 0)
    if num_experts == 0 or not layers:
        return None
    top_k = fields.integer("num_experts_per_tok", minimum=1, default=8)
    if top_k > num_experts:
        raise fields.invalid("num_experts_per_tok", top_k, f"1 to {name} ({num_experts})")
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=fields.integer("moe_intermediate_size", minimum=1),
        norm_topk_prob=fields.boolean("norm_topk_prob", default=False),
        layers=layers,
    )


def _eos(fields: ConfigFields, generation: ConfigFields | None, vocab_size: int) -> tuple[int, ...]:
    for source in (generation, fields):
        if source is not None:
            ids = source.integers("eos_token_id", minimum=0, limit=vocab_size, single=True)
            if ids is not None:
                return tuple(dict.fromkeys(ids))
    return ()


def _bos(fields: ConfigFields, vocab_size: int) -> int:
    ids = fields.integers("bos_token_id", minimum=0, limit=vocab_size, single=True)
    return ids[0] if ids else -1


def _dtype(fields: ConfigFields) -> str:
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    found = fields.raw(name)
    if found is None:
        return "float32"
    if found not in _DTYPES:
        raise fields.invalid(name, found, "one of " + ", ".join(_DTYPES))
    return str(found)
