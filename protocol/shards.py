"""What of a model each rank holds, as ranges of layers, heads, channels and vocabulary.

Workers allocate and load by these ranges, and ``drumline layout`` prints them. Ranges are half open.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TypeAlias

import msgspec

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec

Span: TypeAlias = tuple[int, int]


class RankShards(msgspec.Struct, frozen=True):
    """The part of a model that one rank computes with.

    ``layers``: of its pipeline stage. ``vocab``: rows of embedding and output head, where its stage has them.
    ``q_heads`` and ``kv_heads``: of its attention replica; ``kv_replicated`` when other ranks of the replica hold the
    same KV heads. ``mlp`` and ``shared_mlp``: channels of the dense and the shared experts' feed-forward network, over
    tp. ``expert_mlp``: channels of every routed expert: all with expert parallel, else sharded over dp * tp.
    ``experts``: with expert parallel which share of the slots is decided by the placement (``ep_rank``).
    """

    layers: Span
    first_stage: bool
    last_stage: bool
    vocab: Span
    q_heads: Span
    kv_heads: Span
    kv_replicated: bool
    mlp: Span
    shared_mlp: Span
    expert_mlp: Span
    ep_rank: int

    @property
    def num_layers(self) -> int:
        """How many layers the stage has."""
        return self.layers[1] - self.layers[0]


def split(total: int, parts: int, part: int) -> Span:
    """Part number ``part`` of ``total`` things cut into ``parts`` runs: even, the first ``total % parts`` one more."""
    share, more = divmod(total, parts)
    start = part * share + min(part, more)
    return start, start + share + (part < more)


def layer_split(num_layers: int, stages: int, partition: tuple[int, ...] = ()) -> tuple[Span, ...]:
    """The layers of each stage: by ``partition``, else even, and what is left over goes to one stage after the other
    from the last but one backwards, since the last one has the output head and the first the embedding.

    Raises InvalidConfig when the partition does not add up, or there are fewer layers than stages.
    """
    if not 1 <= stages <= num_layers:
        raise InvalidConfig("pipeline_parallel_size", stages, f"1 to {num_layers}, the layers of the model")
    share, more = divmod(num_layers, stages)
    sizes = [share] * stages
    for i in range(more):
        sizes[(stages - 2 - i) % stages] += 1
    if partition:
        if len(partition) != stages or sum(partition) != num_layers or min(partition) < 1:
            valid = f"{stages} numbers of layers from 1 that add up to {num_layers}, such as {sizes}"
            raise InvalidConfig("pipeline_partition", list(partition), valid)
        sizes = list(partition)
    ends = list(accumulate(sizes))
    return tuple((end - size, end) for size, end in zip(sizes, ends, strict=True))


def kv_head_span(num_kv_heads: int, attn_tp: int, attn_tp_rank: int) -> Span:
    """The KV heads of one rank: a share of them, or one, held by ``attn_tp / num_kv_heads`` ranks alike."""
    if num_kv_heads >= attn_tp:
        return split(num_kv_heads, attn_tp, attn_tp_rank)
    head = attn_tp_rank * num_kv_heads // attn_tp
    return head, head + 1


def attention_replicas(tensor_parallel_size: int, num_kv_heads: int) -> int:
    """Attention replicas of an engine replica with ``enable_dp_attention``: max(tp // KV heads, 1)."""
    return max(tensor_parallel_size // num_kv_heads, 1)


def rank_shards(layout: Layout, spec: ModelSpec, rank: int) -> RankShards:
    """What ``rank`` holds; :func:`check_model` must have passed."""
    at = layout.coordinates(rank)
    stages = layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    attn_tp, tp = layout.attn_tp_size, layout.tensor_parallel_size
    moe = spec.moe
    expert_mlp = shared_mlp = (0, 0)
    if moe is not None:
        shared_mlp = split(moe.shared_intermediate_size, tp, at.tp_rank)
        expert_mlp = (0, moe.moe_intermediate_size)
        if not layout.enable_expert_parallel:
            place = layout.expert_group_rank(rank)
            expert_mlp = split(moe.moe_intermediate_size, layout.expert_group_size, place)
    return RankShards(
        layers=stages[at.pp_rank],
        first_stage=layout.is_first_stage(rank),
        last_stage=layout.is_last_stage(rank),
        vocab=split(spec.vocab_size, attn_tp, at.attn_tp_rank),
        q_heads=split(spec.num_heads, attn_tp, at.attn_tp_rank),
        kv_heads=kv_head_span(spec.num_kv_heads, attn_tp, at.attn_tp_rank),
        kv_replicated=spec.num_kv_heads < attn_tp,
        mlp=split(spec.intermediate_size, tp, at.tp_rank),
        shared_mlp=shared_mlp,
        expert_mlp=expert_mlp,
        ep_rank=layout.ep_rank(rank),
    )


def check_model(layout: Layout, spec: ModelSpec, *, dp_attention: bool | None = None) -> None:
    """Refuse a layout that ``spec`` cannot be cut by. Raises InvalidConfig, naming the field and what would do.

    ``dp_attention``: whether another number of ranks would get attention replicas (:func:`attention_replicas`) too;
    None: as ``layout`` has more than one.
    """
    layout.check()
    layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    if layout.enable_expert_parallel and not spec.is_moe:
        raise InvalidConfig("enable_expert_parallel", True, "False (the model has no experts)")
    dp_attention = layout.attention_data_parallel_size > 1 if dp_attention is None else dp_attention
    why = _why_no_tensor_parallel(layout, spec)
    if why:
        raise uneven_tensor_parallel(layout, spec, dp_attention, why)
    _check_data_parallel(layout, spec)


def uneven_tensor_parallel(layout: Layout, spec: ModelSpec, dp_attention: bool, why: str) -> InvalidConfig:
    """The error for a ``tensor_parallel_size`` by which ``spec`` cannot be cut; the sizes it lists can be had, with
    everything else as it is where any can."""
    tp = layout.tensor_parallel_size
    good = [other for n in range(1, max(tp, spec.num_heads) + 1) if (other := _resized(layout, spec, n, dp_attention))]
    whole = [other for other in good if _most_data_parallel(other, spec) is None]
    sizes = [other.tensor_parallel_size for other in whole or good]
    valid = f"one of {_listed(sizes)}: {why}" if len(sizes) > 1 else f"{sizes[0]}: {why}"
    if _would_do_whole(layout, spec):
        valid += ", or enable_expert_parallel"
    return InvalidConfig("tensor_parallel_size", tp, valid)


def _resized(layout: Layout, spec: ModelSpec, tp: int, dp_attention: bool) -> Layout | None:
    """``layout`` with ``tp`` ranks per stage; None when ``spec`` cannot be cut by that many."""
    attn_dp = attention_replicas(tp, spec.num_kv_heads) if dp_attention else 1
    if tp % attn_dp:
        return None
    other = msgspec.structs.replace(layout, tensor_parallel_size=tp, attention_data_parallel_size=attn_dp)
    return None if _why_no_tensor_parallel(other, spec) else other


def _why_no_tensor_parallel(layout: Layout, spec: ModelSpec) -> str | None:
    """Why ``spec`` cannot be cut by the tp of ``layout``, whatever its dp is; None when it can."""
    tp, attn_tp, moe = layout.tensor_parallel_size, layout.attn_tp_size, spec.moe
    wide = f" within each of {layout.attention_data_parallel_size} attention replicas" if attn_tp < tp else ""
    if spec.num_heads % attn_tp:
        return f"{spec.num_heads} attention heads are shared out evenly{wide}"
    if spec.num_kv_heads % attn_tp and attn_tp % spec.num_kv_heads:
        return f"a divisor or a multiple of {spec.num_kv_heads} KV heads{wide}"
    dense = any(layer not in spec.moe_layers for layer in range(spec.num_layers))
    if dense and spec.intermediate_size % tp:
        return f"intermediate_size ({spec.intermediate_size}) is shared out evenly"
    if moe is None:
        return None
    if moe.shared_intermediate_size % tp:
        return f"the shared experts' intermediate size ({moe.shared_intermediate_size}) is shared out evenly"
    if layout.enable_expert_parallel:
        return f"each rank needs one of {moe.num_experts} experts" if tp > moe.num_experts else None
    if moe.moe_intermediate_size % tp:
        return f"moe_intermediate_size ({moe.moe_intermediate_size}) is cut over dp * tp ranks"
    return None


def _would_do_whole(layout: Layout, spec: ModelSpec) -> bool:
    """Whether whole experts (EP on) can be laid out as sharded ones (EP off) cannot."""
    if not spec.is_moe or layout.enable_expert_parallel:
        return False
    other = msgspec.structs.replace(layout, enable_expert_parallel=True)
    return _why_no_tensor_parallel(other, spec) is None and _most_data_parallel(other, spec) is None


def _most_data_parallel(layout: Layout, spec: ModelSpec) -> str | None:
    """The dp that the experts of ``spec`` allow at the tp of ``layout``; None when its own is one of them."""
    tp, moe = layout.tensor_parallel_size, spec.moe
    if moe is None:
        return None
    if layout.enable_expert_parallel:
        most = moe.num_experts // tp
        if layout.data_parallel_size <= most:
            return None
        sizes = f"1 to {most}" if most > 1 else "1"
        return f"{sizes} at tensor_parallel_size {tp} (each rank needs one of {moe.num_experts} experts)"
    size = moe.moe_intermediate_size
    if size % layout.expert_group_size == 0:
        return None
    sizes = _listed([n // tp for n in divisors(size) if n % tp == 0])
    return f"one of {sizes} at tensor_parallel_size {tp} (moe_intermediate_size {size} is cut over dp * tp ranks)"


def _check_data_parallel(layout: Layout, spec: ModelSpec) -> None:
    valid = _most_data_parallel(layout, spec)
    if valid is None:
        return
    if _would_do_whole(layout, spec):
        valid += ", or enable_expert_parallel"
    raise InvalidConfig("data_parallel_size", layout.data_parallel_size, valid)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _listed(sizes: list[int]) -> str:
    shown = ", ".join(str(size) for size in sizes[:8])
    return shown if len(sizes) <= 8 else f"{shown}, ..."
