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


def check_model(layout: Layout, spec: ModelSpec) -> None:
    """Refuse a layout that ``spec`` cannot be cut by. Raises InvalidConfig, naming the field and what would do."""
    layout.check()
    layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    if layout.enable_expert_parallel and not spec.is_moe:
        raise InvalidConfig("enable_expert_parallel", True, "False (the model has no experts)")
    _check_heads(layout, spec)
    _check_channels(layout, spec)
    _check_experts(layout, spec)


def _check_experts(layout: Layout, spec: ModelSpec) -> None:
    """With expert parallel each rank of a stage needs one expert at least."""
    experts, tp = max(spec.num_experts, 1), layout.tensor_parallel_size
    if layout.ep_size <= experts:
        return
    needs = f"each rank needs one of {spec.num_experts} experts"
    if tp > experts:
        sizes = [n for n in _tensor_parallel_sizes(layout, spec) if n <= experts]
        raise InvalidConfig("tensor_parallel_size", tp, f"one of {_listed(sizes)}: {needs}")
    valid = f"1 to {experts // tp} at tensor_parallel_size {tp} ({needs})"
    raise InvalidConfig("data_parallel_size", layout.data_parallel_size, valid)


def _check_heads(layout: Layout, spec: ModelSpec) -> None:
    attn_tp, attn_dp = layout.attn_tp_size, layout.attention_data_parallel_size
    wide = f" with {attn_dp} attention replicas" if attn_dp > 1 else ""
    if spec.num_heads % attn_tp:
        why = f"{spec.num_heads} attention heads are shared out evenly"
    elif not _kv_fit(spec.num_kv_heads, attn_tp):
        why = f"a divisor or a multiple of {spec.num_kv_heads} KV heads"
    else:
        return
    valid = f"one of {_listed(_tensor_parallel_sizes(layout, spec))}{wide}: {why}"
    raise InvalidConfig("tensor_parallel_size", layout.tensor_parallel_size, valid)


def _tensor_parallel_sizes(layout: Layout, spec: ModelSpec) -> list[int]:
    """The sizes by which the heads can be shared out, with as many attention replicas as ``layout`` has."""
    sizes = (n for n in divisors(spec.num_heads) if _kv_fit(spec.num_kv_heads, n))
    return [n * layout.attention_data_parallel_size for n in sizes]


def _check_channels(layout: Layout, spec: ModelSpec) -> None:
    tp = layout.tensor_parallel_size
    dense = any(layer not in spec.moe_layers for layer in range(spec.num_layers))
    if dense and spec.intermediate_size % tp:
        raise _uneven(tp, "intermediate_size", spec.intermediate_size)
    moe = spec.moe
    if moe is None:
        return
    if moe.shared_intermediate_size % tp:
        raise _uneven(tp, "the shared experts' intermediate size", moe.shared_intermediate_size)
    over = layout.expert_group_size
    size = moe.moe_intermediate_size
    if layout.enable_expert_parallel or size % over == 0:
        return
    cut = f"moe_intermediate_size {size} is cut over dp * tp ranks"
    if size % tp:
        sizes = [n for n in _tensor_parallel_sizes(layout, spec) if size % n == 0]
        raise InvalidConfig("tensor_parallel_size", tp, f"one of {_listed(sizes)} ({cut}), or enable_expert_parallel")
    sizes = [n // tp for n in divisors(size) if n % tp == 0]
    valid = f"one of {_listed(sizes)} at tensor_parallel_size {tp} ({cut}), or enable_expert_parallel"
    raise InvalidConfig("data_parallel_size", layout.data_parallel_size, valid)


def _uneven(tp: int, what: str, size: int) -> InvalidConfig:
    valid = f"one of {_listed(divisors(size))}: {what} ({size}) is shared out evenly"
    return InvalidConfig("tensor_parallel_size", tp, valid)


def _kv_fit(num_kv_heads: int, attn_tp: int) -> bool:
    return num_kv_heads % attn_tp == 0 or attn_tp % num_kv_heads == 0


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _listed(sizes: list[int]) -> str:
    shown = ", ".join(str(size) for size in sizes[:8])
    return shown if len(sizes) <= 8 else f"{shown}, ..."
