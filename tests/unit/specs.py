"""A small model of 30 layers, and the experts that a MoE one has."""

from __future__ import annotations

from drumline.protocol.modelspec import ModelSpec, MoeSpec, RopeScaling

DENSE = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=250,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=RopeScaling(),
    tie_word_embeddings=False,
    attention_bias=False,
    qk_norm=False,
    max_position_embeddings=128,
    eos_token_ids=(),
    bos_token_id=-1,
    dtype="bfloat16",
)
EXPERTS = MoeSpec(num_experts=33, top_k=2, moe_intermediate_size=24, norm_topk_prob=True, layers=tuple(range(1, 30)))
