"""The shape of a model as its Hugging Face folder states it, read without torch.

Both key styles are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``num_experts``, ``torch_dtype``) and
transformers 5 (``rope_parameters``, ``num_local_experts``, ``dtype``). What a config leaves out has the value that
transformers gives it for that architecture. Whatever would change the arithmetic and is not implemented is refused by
name, so that no model is ever served almost right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from drumline.protocol.architectures import (
    ARCHITECTURES,
    Architecture,
    read_architecture,
    refuse_sliding_window,
    refuse_unimplemented,
)
from drumline.protocol.attentionspec import MlaSpec, read_heads, read_latent_heads
from drumline.protocol.configfields import ConfigFields, read_json_object
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.moespec import MoeSpec
from drumline.protocol.rope import RopeScaling, read_rope, softmax_scale

__all__ = ["SUPPORTED_ARCHITECTURES", "MlaSpec", "ModelSpec", "MoeSpec", "RopeScaling"]

SUPPORTED_ARCHITECTURES = tuple(ARCHITECTURES)
# What is larger is a mistake, and would cost memory before any check of the checkpoint could find it.
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24

_DTYPES = ("float32", "bfloat16", "float16")


class ModelSpec(msgspec.Struct, frozen=True):
    """What the config of a model folder says, checked.

    ``intermediate_size`` is that of the dense layers. ``dtype`` is the one of the checkpoint: float32, bfloat16 or
    float16. ``bos_token_id`` is -1 when there is none. ``eos_token_ids`` come from generation_config.json, else from
    config.json, and may be empty. ``moe`` is None when no layer has experts.

    ``attention_bias``: the projections of queries, keys and values have a bias (with ``mla``, see MlaSpec);
    ``attention_output_bias``: so has the output's. ``mla`` is None for ordinary attention; else ``num_kv_heads`` is 1
    and ``head_dim`` that of a query head, rotated channels included. ``rope_interleaved``: rotation pairs channels
    0 and 1, 2 and 3, ...; otherwise those of the first half with those of the second. ``softmax_scale`` multiplies
    attention scores; 0 means ``head_dim ** -0.5``.
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
        """Channels of a query head that rotate; with ``mla`` they are its last, otherwise all."""
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
    def from_folder(cls, folder: str | Path, *, allow_quantized: bool = False) -> ModelSpec:
        """Read ``config.json`` (and ``generation_config.json`` when there is one) of ``folder``.

        ``allow_quantized``: for who wants the shape alone, as :meth:`from_config`. Raises InvalidConfig, naming field,
        what was found and what would be valid.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InvalidConfig("model", str(folder), "an existing folder that holds config.json and safetensors files")
        fields = ConfigFields(read_json_object(folder / "config.json"), folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = (
            ConfigFields(read_json_object(generation_path), generation_path) if generation_path.exists() else None
        )
        return _read_spec(fields, generation, allow_quantized=allow_quantized)

    @classmethod
    def from_config(cls, values: dict[str, Any], where: Path | str, *, allow_quantized: bool = False) -> ModelSpec:
        """The same from a parsed config.json; ``where`` is what messages call it.

        A ``quantization_config`` is refused unless ``allow_quantized``: then it is ignored, and the spec is that of the
        model before it was quantized. Raises InvalidConfig.
        """
        return _read_spec(ConfigFields(values, where), None, allow_quantized=allow_quantized)


def _read_spec(fields: ConfigFields, generation: ConfigFields | None, *, allow_quantized: bool) -> ModelSpec:
    name, architecture = read_architecture(fields)
    refuse_unimplemented(fields, architecture, allow_quantized=allow_quantized)

    num_layers = fields.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)
    hidden_size = fields.integer("hidden_size", minimum=1)
    if architecture.mla:
        heads = read_latent_heads(fields)
    else:
        heads = read_heads(
            fields,
            hidden_size=hidden_size,
            default_kv_heads=architecture.num_kv_heads,
            default_head_dim=architecture.head_dim,
        )
    vocab_size = fields.integer("vocab_size", minimum=1)
    max_positions = fields.integer(
        "max_position_embeddings", minimum=1, maximum=MAX_POSITIONS, default=architecture.max_position_embeddings
    )
    rope = read_rope(fields, default_theta=architecture.rope_theta, max_positions=max_positions)
    refuse_sliding_window(fields, architecture, num_layers=num_layers, max_positions=max_positions)
    attention_bias, attention_output_bias = _attention_biases(fields, architecture)
    return ModelSpec(
        architecture=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        intermediate_size=fields.integer("intermediate_size", minimum=1),
        vocab_size=vocab_size,
        rms_norm_eps=fields.number("rms_norm_eps", default=architecture.rms_norm_eps, above=0.0),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=attention_bias,
        qk_norm=architecture.qk_norm,
        max_position_embeddings=max_positions,
        eos_token_ids=_eos(fields, generation, vocab_size),
        bos_token_id=_bos(fields, vocab_size),
        dtype=_dtype(fields),
        moe=architecture.read_moe(fields, num_layers),
        attention_output_bias=attention_output_bias,
        mla=heads.mla,
        rope_interleaved=architecture.mla and fields.boolean("rope_interleave", default=True),
        softmax_scale=softmax_scale(rope, heads.head_dim) if heads.mla is not None else 0.0,
    )


def _attention_biases(fields: ConfigFields, architecture: Architecture) -> tuple[bool, bool]:
    """Whether the projections before attention have a bias, and the one after."""
    if architecture.qkv_bias:
        return True, False
    biased = fields.boolean("attention_bias", default=False)
    return biased, biased


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
