"""The attention heads of a model as its config states them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from drumline.protocol.configfields import ConfigFields


class MlaSpec(msgspec.Struct, frozen=True):
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1), in channels.

    What is cached of a token is its latent (``kv_lora_rank``) and one rotated key (``qk_rope_head_dim``) for all heads.
    A query head has ``qk_nope_head_dim`` channels without rotation, then ``qk_rope_head_dim`` with; a value head has
    ``v_head_dim``. ``q_lora_rank`` 0: queries are projected directly. With ``attention_bias`` the projections to the
    two latents have a bias, those from them and the direct one of the queries never. The norms of the latents use an
    epsilon of 1e-6, whatever rms_norm_eps says.
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class Heads(NamedTuple):
    """``head_dim`` is that of a query head. With ``mla`` one latent stands for all key and value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mla: MlaSpec | None = None


def read_heads(fields: ConfigFields, *, hidden_size: int, default_kv_heads: int, default_head_dim: int) -> Heads:
    """Heads of full or grouped-query attention. A default of 0 means: as many as query heads, and their share of
    ``hidden_size``. Raises InvalidConfig."""
    num_heads = fields.integer("num_attention_heads", minimum=1)
    # To transformers null means one per query head, while an absent key means what the architecture has.
    absent = not fields.has("num_key_value_heads")
    default = default_kv_heads if absent and default_kv_heads else num_heads
    num_kv_heads = fields.integer("num_key_value_heads", minimum=1, default=default)
    if num_heads % num_kv_heads:
        raise fields.invalid("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", minimum=2, default=default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.invalid("head_dim", head_dim, "an even number (rotary embeddings pair the channels)")
    return Heads(num_heads, num_kv_heads, head_dim)


def read_latent_heads(fields: ConfigFields) -> Heads:
    """Heads of multi-head latent attention, with the defaults of DeepSeek-V2 and V3. Raises InvalidConfig."""
    num_heads = fields.integer("num_attention_heads", minimum=1)
    num_kv_heads = fields.integer("num_key_value_heads", minimum=1, default=num_heads)
    if num_kv_heads != num_heads:
        raise fields.invalid("num_key_value_heads", num_kv_heads, f"num_attention_heads ({num_heads})")
    rotated = fields.integer("qk_rope_head_dim", minimum=2, default=64)
    if rotated % 2:
        raise fields.invalid("qk_rope_head_dim", rotated, "an even number (rotary embeddings pair the channels)")
    # transformers writes the rotated size here, and would rotate by it.
    if fields.integer("head_dim", minimum=1, default=rotated) != rotated:
        raise fields.invalid("head_dim", fields.raw("head_dim"), f"absent, or qk_rope_head_dim ({rotated})")
    direct = fields.has("q_lora_rank") and fields.raw("q_lora_rank") is None
    mla = MlaSpec(
        q_lora_rank=0 if direct else fields.integer("q_lora_rank", minimum=1, default=1536),
        kv_lora_rank=fields.integer("kv_lora_rank", minimum=1, default=512),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", minimum=1, default=128),
        qk_rope_head_dim=rotated,
        v_head_dim=fields.integer("v_head_dim", minimum=1, default=128),
    )
    return Heads(num_heads, 1, mla.qk_nope_head_dim + rotated, mla)
