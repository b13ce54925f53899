"""Every weight of a model by its name in a checkpoint: its shape, its kind, and how ranks cut it.

Workers load by these pieces, and ``drumline layout`` adds up their bytes, so that what is said is what is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from drumline.protocol.errors import ProtocolError
from drumline.protocol.modelspec import MlaSpec, ModelSpec, MoeSpec
from drumline.protocol.shards import RankShards, Span

KINDS = ("embedding", "attention", "mlp", "router", "experts", "shared_experts", "norm", "head")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED_FROM = 1 << 18
"""A CPU lays out weights of so many numbers anew, for the products of small batches; smaller ones gain nothing."""
EXPERT = "{expert}"
"""Stands for the expert's number in the name of an expert's weight."""


class Cut(msgspec.Struct, frozen=True, gc=False):
    """How ranks cut one dimension: by ``axis``, a range of :class:`RankShards`, each of whose members takes ``unit``
    entries."""

    axis: str
    unit: int = 1


class Weight(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a checkpoint. ``cuts`` has one entry per dimension, None where every rank holds the whole of it.
    ``layer`` is -1 outside of layers. ``dtype``: empty for the model's own. ``name`` holds ``{expert}`` for the weights
    of routed experts, which stand here once for all of them."""

    name: str
    kind: str
    shape: tuple[int, ...]
    cuts: tuple[Cut | None, ...]
    layer: int = -1
    dtype: str = ""

    @property
    def per_expert(self) -> bool:
        """Whether each routed expert has one."""
        return EXPERT in self.name


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one rank holds of a weight: entries ``spans[d][0]`` to ``spans[d][1]`` of every dimension d."""

    weight: Weight
    spans: tuple[Span, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece."""
        return tuple(end - start for start, end in self.spans)

    @property
    def whole(self) -> bool:
        """Whether it is all of the weight."""
        return self.shape == self.weight.shape

    def nbytes(self, dtype: str) -> int:
        """Bytes of the piece where the model's dtype is ``dtype``."""
        return math.prod(self.shape) * DTYPE_BYTES[self.weight.dtype or dtype]


class ModelWeights:
    """The weights of a model, and which piece of each a rank holds."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.by_name = {weight.name: weight for weight in model_weights(spec)}

    def piece(self, name: str, shards: RankShards) -> Piece:
        """The piece of ``name`` that belongs to ``shards``. Raises ProtocolError for a name that the model lacks."""
        weight = self.by_name.get(name)
        if weight is None:
            raise ProtocolError(f"{self.spec.architecture} has no weight {name}")
        spans = tuple(_span(cut, size, shards) for cut, size in zip(weight.cuts, weight.shape, strict=True))
        return Piece(weight, spans)

    def held(self, shards: RankShards) -> Iterator[Piece]:
        """The pieces of a rank, those of routed experts once for all of them."""
        for weight in self.by_name.values():
            if self._belongs(weight, shards):
                yield self.piece(weight.name, shards)

    def _belongs(self, weight: Weight, shards: RankShards) -> bool:
        if weight.layer >= 0:
            return shards.layers[0] <= weight.layer < shards.layers[1]
        if weight.kind == "embedding":
            return shards.first_stage or (shards.last_stage and self.spec.tie_word_embeddings)
        return shards.last_stage

    def bytes_by_kind(
        self, shards: RankShards, slots: dict[int, int], dtype: str, device: str = "cuda"
    ) -> dict[str, int]:
        """Bytes of a rank by kind, kinds without any left out. ``slots``: expert slots of the rank by layer.

        On the CPU (``device``) an output head that is tied to the embedding of the same rank is a copy of its own when
        it is large: rows are looked up in one layout and multiplied in another.
        """
        totals = dict.fromkeys(KINDS, 0)
        for piece in self.held(shards):
            copies = slots[piece.weight.layer] if piece.weight.per_expert else 1
            totals[piece.weight.kind] += piece.nbytes(dtype) * copies
            tied = piece.weight.kind == "embedding" and self.spec.tie_word_embeddings
            if device == "cpu" and tied and shards.first_stage and shards.last_stage:
                totals["head"] += piece.nbytes(dtype) if math.prod(piece.shape) >= PACKED_FROM else 0
        return {kind: total for kind, total in totals.items() if total}

    def num_parameters(self) -> int:
        """Parameters of the whole model, every tensor once."""
        experts = self.spec.num_experts
        return sum(math.prod(w.shape) * (experts if w.per_expert else 1) for w in self.by_name.values())


def kv_entries_per_token(spec: ModelSpec, shards: RankShards) -> int:
    """Numbers that one token adds to a rank's KV cache: per layer 2 * KV heads * head_dim, with latent attention
    kv_lora_rank + qk_rope_head_dim."""
    if spec.mla is not None:
        per_layer = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    else:
        per_layer = 2 * (shards.kv_heads[1] - shards.kv_heads[0]) * spec.head_dim
    return shards.num_layers * per_layer


def _span(cut: Cut | None, size: int, shards: RankShards) -> Span:
    if cut is None:
        return 0, size
    start, end = getattr(shards, cut.axis)
    return start * cut.unit, end * cut.unit


# --------------------------------------------------------------------------------------------------- what a model has


def model_weights(spec: ModelSpec) -> Iterator[Weight]:
    """Every weight of ``spec``, in the order of computation."""
    vocab = (Cut("vocab"), None)
    yield Weight("model.embed_tokens.weight", "embedding", (spec.vocab_size, spec.hidden_size), vocab)
    for layer in range(spec.num_layers):
        yield from _layer_weights(spec, layer)
    yield Weight("model.norm.weight", "norm", (spec.hidden_size,), (None,))
    if not spec.tie_word_embeddings:
        yield Weight("lm_head.weight", "head", (spec.vocab_size, spec.hidden_size), vocab)


def _layer_weights(spec: ModelSpec, layer: int) -> Iterator[Weight]:
    prefix, hidden = f"model.layers.{layer}", spec.hidden_size
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(f"{prefix}.{name}.weight", "norm", (hidden,), (None,), layer)
    attention = f"{prefix}.self_attn"
    if spec.mla is None:
        yield from _attention(spec, attention, layer)
    else:
        yield from _latent_attention(spec, spec.mla, attention, layer)
    moe = spec.moe
    if moe is not None and layer in moe.layers:
        yield from _experts(spec, moe, prefix, layer)
    else:
        yield from _gated(f"{prefix}.mlp", "mlp", hidden, spec.intermediate_size, "mlp", layer)


def _attention(spec: ModelSpec, prefix: str, layer: int) -> Iterator[Weight]:
    dim, hidden = spec.head_dim, spec.hidden_size
    query, key = Cut("q_heads", dim), Cut("kv_heads", dim)
    rows = (("q_proj", spec.num_heads, query), ("k_proj", spec.num_kv_heads, key), ("v_proj", spec.num_kv_heads, key))
    for name, heads, cut in rows:
        yield Weight(f"{prefix}.{name}.weight", "attention", (heads * dim, hidden), (cut, None), layer)
        if spec.attention_bias:
            yield Weight(f"{prefix}.{name}.bias", "attention", (heads * dim,), (cut,), layer)
    yield Weight(f"{prefix}.o_proj.weight", "attention", (hidden, spec.num_heads * dim), (None, query), layer)
    if spec.attention_output_bias:
        yield Weight(f"{prefix}.o_proj.bias", "attention", (hidden,), (None,), layer)
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Weight(f"{prefix}.{name}.weight", "attention", (dim,), (None,), layer)


def _latent_attention(spec: ModelSpec, mla: MlaSpec, prefix: str, layer: int) -> Iterator[Weight]:
    hidden, heads, rank = spec.hidden_size, spec.num_heads, mla.kv_lora_rank
    query_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    query = (Cut("q_heads", query_dim), None)
    latent = [("kv_a_proj_with_mqa", rank + mla.qk_rope_head_dim)]
    if mla.q_lora_rank:
        latent.insert(0, ("q_a_proj", mla.q_lora_rank))
        yield Weight(f"{prefix}.q_a_layernorm.weight", "attention", (mla.q_lora_rank,), (None,), layer)
        shape = (heads * query_dim, mla.q_lora_rank)
        yield Weight(f"{prefix}.q_b_proj.weight", "attention", shape, query, layer)
    else:
        yield Weight(f"{prefix}.q_proj.weight", "attention", (heads * query_dim, hidden), query, layer)
    for name, size in latent:
        yield Weight(f"{prefix}.{name}.weight", "attention", (size, hidden), (None, None), layer)
        if spec.attention_bias:
            yield Weight(f"{prefix}.{name}.bias", "attention", (size,), (None,), layer)
    yield Weight(f"{prefix}.kv_a_layernorm.weight", "attention", (rank,), (None,), layer)
    out = mla.qk_nope_head_dim + mla.v_head_dim
    yield Weight(f"{prefix}.kv_b_proj.weight", "attention", (heads * out, rank), (Cut("q_heads", out), None), layer)
    cuts = (None, Cut("q_heads", mla.v_head_dim))
    yield Weight(f"{prefix}.o_proj.weight", "attention", (hidden, heads * mla.v_head_dim), cuts, layer)
    if spec.attention_output_bias:
        yield Weight(f"{prefix}.o_proj.bias", "attention", (hidden,), (None,), layer)


def _experts(spec: ModelSpec, moe: MoeSpec, prefix: str, layer: int) -> Iterator[Weight]:
    names = expert_names(spec)
    block, hidden, size = f"{prefix}.{names.block}", spec.hidden_size, moe.moe_intermediate_size
    yield Weight(f"{block}.gate.weight", "router", (moe.num_experts, hidden), (None, None), layer)
    if moe.topk_method == "noaux_tc":
        bias = f"{block}.gate.e_score_correction_bias"
        yield Weight(bias, "router", (moe.num_experts,), (None,), layer, "float32")
    if moe.shared_intermediate_size:
        shared = f"{block}.shared_experts"
        yield from _gated(shared, "shared_experts", hidden, moe.shared_intermediate_size, "shared_mlp", layer)
    up, down = (Cut("expert_mlp"), None), (None, Cut("expert_mlp"))
    for name in (names.gate, names.up):
        yield Weight(f"{block}.experts.{EXPERT}.{name}.weight", "experts", (size, hidden), up, layer)
    yield Weight(f"{block}.experts.{EXPERT}.{names.down}.weight", "experts", (hidden, size), down, layer)


def _gated(prefix: str, kind: str, hidden: int, size: int, axis: str, layer: int) -> Iterator[Weight]:
    for name in ("gate_proj", "up_proj"):
        yield Weight(f"{prefix}.{name}.weight", kind, (size, hidden), (Cut(axis), None), layer)
    yield Weight(f"{prefix}.down_proj.weight", kind, (hidden, size), (None, Cut(axis)), layer)


class ExpertNames(msgspec.Struct, frozen=True):
    """How an architecture names its block of experts and the three projections of one."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


_MIXTRAL = ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def expert_names(spec: ModelSpec) -> ExpertNames:
    """The names that checkpoints of ``spec`` use."""
    return _MIXTRAL if spec.architecture == "MixtralForCausalLM" else ExpertNames()
