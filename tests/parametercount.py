"""How many numbers the checkpoint of a model holds, counted from its shape alone."""

from __future__ import annotations

from drumline.protocol.modelspec import ModelSpec


def count_parameters(spec: ModelSpec) -> int:
    """All tensors, correction biases of routers included; tied embeddings count once."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    attention = _latent_attention(spec) if spec.mla is not None else _attention(spec)
    mlps = sum(_experts(spec) if i in spec.moe_layers else _dense(spec) for i in range(spec.num_layers))
    return embeddings + norms + spec.num_layers * attention + mlps


def _attention(spec: ModelSpec) -> int:
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    weights = spec.hidden_size * (2 * queries + 2 * keys)
    biases = (queries + 2 * keys) * spec.attention_bias + spec.hidden_size * spec.attention_output_bias
    return weights + biases + 2 * spec.head_dim * spec.qk_norm


def _latent_attention(spec: ModelSpec) -> int:
    mla = spec.mla
    assert mla is not None
    queries = spec.num_heads * spec.head_dim
    if mla.q_lora_rank:
        query = mla.q_lora_rank * (spec.hidden_size + 1 + queries + spec.attention_bias)
    else:
        query = spec.hidden_size * queries
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    down = latent * (spec.hidden_size + spec.attention_bias) + mla.kv_lora_rank
    up = mla.kv_lora_rank * spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    output = spec.hidden_size * (spec.num_heads * mla.v_head_dim + spec.attention_output_bias)
    return query + down + up + output


def _dense(spec: ModelSpec) -> int:
    return 3 * spec.hidden_size * spec.intermediate_size


def _experts(spec: ModelSpec) -> int:
    moe = spec.moe
    assert moe is not None
    width = moe.num_experts * moe.moe_intermediate_size + moe.shared_intermediate_size
    correction = moe.num_experts if moe.topk_method == "noaux_tc" else 0
    return 3 * spec.hidden_size * width + moe.num_experts * spec.hidden_size + correction
