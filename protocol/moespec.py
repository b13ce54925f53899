"""The experts of a model as its config states them, one reader per architecture.

The keys, their defaults and the rules are those of transformers' models of the same name.
"""

from __future__ import annotations

import msgspec

from drumline.protocol.configfields import ConfigFields

# What is larger is a mistake, and would cost memory before any check of the checkpoint could find it.
MAX_EXPERTS = 8192


class MoeSpec(msgspec.Struct, frozen=True):
    """The experts of a model, and how a token gets its ``top_k``.

    ``layers``: the indices of the layers with experts, ascending. ``shared_intermediate_size``: width of the MLP beside
    the experts that every token passes, 0 without one; it is added unscaled.

    Scores are ``scoring`` (softmax or sigmoid, over all experts, float32) of the router's logits. ``topk_method``:
    greedy takes the ``top_k`` largest; group_limited_greedy takes them from the ``topk_groups`` of ``num_groups``
    groups with the largest maxima; noaux_tc adds a correction bias to the scores for the choice alone and ranks groups
    by the sum of their two largest. Groups are contiguous and of one size. The weights are the scores of the chosen,
    divided by their sum if ``norm_topk_prob``, then multiplied by ``routed_scaling_factor``.
    """

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


def read_qwen3_moe(fields: ConfigFields, num_layers: int) -> MoeSpec | None:
    """Experts of Qwen3MoeForCausalLM; None when no layer has any."""
    name = _first(fields, "num_experts", "num_local_experts")
    num_experts = fields.integer(name, minimum=0, maximum=MAX_EXPERTS, default=128)
    sparse_step = fields.integer("decoder_sparse_step", minimum=1, default=1)
    mlp_only = fields.integers("mlp_only_layers", minimum=0, limit=num_layers, single=False) or ()
    # The rule of Qwen3MoeDecoderLayer in transformers.
    layers = tuple(i for i in range(num_layers) if i not in mlp_only and (i + 1) % sparse_step == 0)
    if num_experts == 0 or not layers:
        return None
    return MoeSpec(
        num_experts=num_experts,
        top_k=_top_k(fields, name, num_experts, default=8),
        moe_intermediate_size=fields.integer("moe_intermediate_size", minimum=1),
        norm_topk_prob=fields.boolean("norm_topk_prob", default=False),
        layers=layers,
    )


def read_mixtral(fields: ConfigFields, num_layers: int) -> MoeSpec:
    """Experts of MixtralForCausalLM: in every layer, as wide as ``intermediate_size``, always normalised."""
    name = _first(fields, "num_local_experts", "num_experts")
    num_experts = fields.integer(name, minimum=1, maximum=MAX_EXPERTS, default=8)
    return MoeSpec(
        num_experts=num_experts,
        top_k=_top_k(fields, name, num_experts, default=2),
        moe_intermediate_size=fields.integer("intermediate_size", minimum=1),
        norm_topk_prob=True,
        layers=tuple(range(num_layers)),
    )


def read_deepseek_v2(fields: ConfigFields, num_layers: int) -> MoeSpec | None:
    """Experts of DeepseekV2ForCausalLM; None when every layer is dense. Its weights are never normalised."""
    layers = _after_the_dense(fields, num_layers, default=0)
    if not layers:
        return None
    name, num_experts = _routed_experts(fields, default=64)
    top_k = _top_k(fields, name, num_experts, default=None)
    method = fields.one_of("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    groups = (1, 1) if method == "greedy" else _groups(fields, num_experts, top_k, smallest=1, default=None)
    width = fields.integer("moe_intermediate_size", minimum=1, default=1407)
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=False,
        layers=layers,
        shared_intermediate_size=_shared_experts(fields, default=2) * width,
        topk_method=method,
        num_groups=groups[0],
        topk_groups=groups[1],
        routed_scaling_factor=fields.number("routed_scaling_factor", above=0.0, default=1.0),
    )


def read_deepseek_v3(fields: ConfigFields, num_layers: int) -> MoeSpec | None:
    """Experts of DeepseekV3ForCausalLM; None when every layer is dense."""
    layers = _after_the_dense(fields, num_layers, default=3)
    if not layers:
        return None
    name, num_experts = _routed_experts(fields, default=256)
    top_k = _top_k(fields, name, num_experts, default=8)
    # A group's rank is the sum of its two best, so it must have two.
    num_groups, topk_groups = _groups(fields, num_experts, top_k, smallest=2, default=(8, 4))
    width = fields.integer("moe_intermediate_size", minimum=1, default=2048)
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=fields.boolean("norm_topk_prob", default=True),
        layers=layers,
        shared_intermediate_size=_shared_experts(fields, default=1) * width,
        scoring="sigmoid",
        topk_method="noaux_tc",
        num_groups=num_groups,
        topk_groups=topk_groups,
        routed_scaling_factor=fields.number("routed_scaling_factor", above=0.0, default=2.5),
    )


def _first(fields: ConfigFields, name: str, other: str) -> str:
    """Which of two names for one thing the config uses; ``other`` only when ``name`` is absent."""
    return other if fields.raw(name) is None and fields.raw(other) is not None else name


def _top_k(fields: ConfigFields, experts_name: str, num_experts: int, *, default: int | None) -> int:
    top_k = fields.integer("num_experts_per_tok", minimum=1, default=default)
    if top_k > num_experts:
        raise fields.invalid("num_experts_per_tok", top_k, f"1 to {experts_name} ({num_experts})")
    return top_k


def _after_the_dense(fields: ConfigFields, num_layers: int, *, default: int) -> tuple[int, ...]:
    return tuple(range(fields.integer("first_k_dense_replace", minimum=0, default=default), num_layers))


def _routed_experts(fields: ConfigFields, *, default: int) -> tuple[str, int]:
    name = next((n for n in ("num_experts", "num_local_experts") if fields.raw(n) is not None), "n_routed_experts")
    name = _first(fields, "n_routed_experts", name)
    return name, fields.integer(name, minimum=1, maximum=MAX_EXPERTS, default=default)


def _shared_experts(fields: ConfigFields, *, default: int) -> int:
    # To DeepSeek's own code null means none; to transformers it means nothing.
    if fields.has("n_shared_experts") and fields.raw("n_shared_experts") is None:
        raise fields.invalid("n_shared_experts", None, "a whole number (0: no shared expert)")
    return fields.integer("n_shared_experts", minimum=0, maximum=MAX_EXPERTS, default=default)


def _groups(
    fields: ConfigFields, num_experts: int, top_k: int, *, smallest: int, default: tuple[int, int] | None
) -> tuple[int, int]:
    """Groups and how many of them a token may use; each has ``smallest`` experts or more."""
    most = num_experts // smallest
    num_groups = fields.integer("n_group", minimum=1, default=default[0] if default else None)
    if num_experts % num_groups or num_groups > most:
        raise fields.invalid("n_group", num_groups, f"a divisor of the number of experts ({num_experts}), 1 to {most}")
    topk_groups = fields.integer("topk_group", minimum=1, default=default[1] if default else None)
    if topk_groups > num_groups:
        raise fields.invalid("topk_group", topk_groups, f"1 to n_group ({num_groups})")
    room = topk_groups * (num_experts // num_groups)
    if top_k > room:
        raise fields.invalid("num_experts_per_tok", top_k, f"1 to {room}, the experts of topk_group ({topk_groups})")
    return num_groups, topk_groups
