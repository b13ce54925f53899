"""What to change when GPUs stay idle, or when the weights do not fit: layouts that the model can have, compared."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from drumline.engine.config import ParallelConfig
from drumline.engine.layout_report.memory import counted, in_bytes, with_memory
from drumline.engine.layout_report.question import Question
from drumline.engine.layout_report.ranks import RankReport, rank_reports
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.shards import layer_split

_SIZE_FLAGS = (("-tp", "tensor_parallel_size"), ("-pp", "pipeline_parallel_size"), ("-dp", "data_parallel_size"))
_SHOWN = 3
_GROWTH = (2, 4, 8, 16, 32, 64)


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """Other sizes for the same model. ``flags``: those of a command line; ``change``: what differs from what was asked.
    ``valid``: the model can be cut so.

    ``reason``: what they change, or why they cannot be. ``weight_bytes``: of the heaviest rank, ``kv_tokens``: that all
    replicas hold together; None where they are not known. ``fits``: one sequence of the longest context has room.
    """

    flags: str
    change: str
    num_gpus: int
    valid: bool
    reason: str
    weight_bytes: int | None = None
    kv_tokens: int | None = None
    fits: bool | None = None


class Advice(msgspec.Struct, frozen=True):
    """``suggestion``: None when nothing is to be said."""

    suggestion: str | None
    alternatives: tuple[Alternative, ...]


def advise(question: Question, ranks: tuple[RankReport, ...]) -> Advice:
    """How to use idle GPUs, and what to do when a rank has no room for one sequence of the longest context."""
    texts: list[str] = []
    alternatives: list[Alternative] = []
    if question.num_gpus > question.layout.num_ranks:
        alternatives = [_consider(question, sizes) for sizes in _to_fill(question)]
        texts.append(_filling(question, alternatives))
    if any(one.fits is False for one in ranks) and not any(one.fits for one in alternatives):
        larger = _that_fit(question)
        alternatives += [one for one in larger if one.flags not in {known.flags for known in alternatives}]
        texts.append(_fitting(question, ranks, larger))
    return Advice("; ".join(texts) or None, tuple(alternatives))


# ------------------------------------------------------------------------------------------------------- idle GPUs


def _to_fill(question: Question) -> Iterator[ParallelConfig]:
    """Sizes that use more of the GPUs: one size multiplied, else whatever product comes closest."""
    sizes, times = question.parallel, question.num_gpus // question.layout.num_ranks
    if times == 1:
        yield from _products(question)
        return
    wider = msgspec.structs.replace(sizes, data_parallel_size=sizes.data_parallel_size * times)
    yield wider
    if question.spec.is_moe and not sizes.enable_expert_parallel and not _valid(question, wider):
        yield msgspec.structs.replace(wider, enable_expert_parallel=True)
    yield msgspec.structs.replace(sizes, tensor_parallel_size=sizes.tensor_parallel_size * times)
    deeper = sizes.pipeline_parallel_size * times
    yield msgspec.structs.replace(sizes, pipeline_parallel_size=deeper, pipeline_partition=None)


def _products(question: Question) -> list[ParallelConfig]:
    """The valid sizes that use the most GPUs beyond those in use; nearest to what was asked for first."""
    asked = question.parallel
    for gpus in range(question.num_gpus, question.layout.num_ranks, -1):
        found = []
        for tp, pp, dp in _triples(gpus):
            same = pp == asked.pipeline_parallel_size
            sizes = msgspec.structs.replace(
                asked,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                data_parallel_size=dp,
                pipeline_partition=asked.pipeline_partition if same else None,
            )
            if question.spec.is_moe and not _valid(question, sizes):
                sizes = msgspec.structs.replace(sizes, enable_expert_parallel=True)
            if _valid(question, sizes):
                changed = (tp != asked.tensor_parallel_size, not same, dp != asked.data_parallel_size)
                found.append((sum(changed), -tp, pp, sizes))
        if found:
            found.sort(key=lambda one: one[:3])
            return [one[3] for one in found[:_SHOWN]]
    return []


def _triples(gpus: int) -> Iterator[tuple[int, int, int]]:
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp in divisors:
        for pp in divisors:
            if gpus % (tp * pp) == 0:
                yield tp, pp, gpus // (tp * pp)


def _filling(question: Question, alternatives: list[Alternative]) -> str:
    idle = question.num_gpus - question.layout.num_ranks
    lead = f"{idle} of {question.num_gpus} GPUs stay idle"
    good = sorted((one for one in alternatives if one.valid), key=lambda one: one.fits is False)
    if not good:
        return f"{lead}, and no sizes of this model use more of them"
    best, others = good[0], good[1:]
    text = f"{lead}: {_said(question, best)}"
    if others:
        text += "; or " + "; or ".join(f"{one.change} ({one.reason})" for one in others)
    return text


def _said(question: Question, best: Alternative) -> str:
    used = "all" if best.num_gpus == question.num_gpus else f"{best.num_gpus} of the"
    return f"{best.change} to use {used} {question.num_gpus} ({best.reason})"


def size_flags(sizes: ParallelConfig) -> str:
    """The sizes that are not 1, as flags of a command line; ``-tp 1`` when all are."""
    shown = [f"{flag} {getattr(sizes, field)}" for flag, field in _SIZE_FLAGS if getattr(sizes, field) > 1]
    shown = shown or ["-tp 1"]
    if sizes.enable_expert_parallel:
        shown.append("--enable-expert-parallel")
    if sizes.enable_dp_attention:
        shown.append("--enable-dp-attention")
    if sizes.enable_eplb:
        shown.append("--enable-eplb")
    if sizes.eplb_config.num_redundant_experts:
        shown.append(f"--num-redundant-experts {sizes.eplb_config.num_redundant_experts}")
    return " ".join(shown)


def _change(before: ParallelConfig, after: ParallelConfig) -> str:
    """What to do to a command line: "add -dp 2" where there was no such flag, "set -tp 8" where there was one."""
    flags, verb = [], "add"
    for flag, field in _SIZE_FLAGS:
        if getattr(after, field) != getattr(before, field):
            flags.append(f"{flag} {getattr(after, field)}")
            verb = "set" if getattr(before, field) > 1 else verb
    if after.enable_expert_parallel and not before.enable_expert_parallel:
        flags.append("--enable-expert-parallel")
    return f"{verb} {' '.join(flags)}"


# ---------------------------------------------------------------------------------------------------- what would fit


def _that_fit(question: Question) -> list[Alternative]:
    """The smallest worlds, two to 64 times as large, in which one sequence of the longest context has room."""
    sizes = question.parallel
    for times in _GROWTH:
        grown = []
        if question.spec.is_moe:
            grown.append(msgspec.structs.replace(sizes, data_parallel_size=sizes.data_parallel_size * times))
        grown.append(msgspec.structs.replace(sizes, tensor_parallel_size=sizes.tensor_parallel_size * times))
        deeper = sizes.pipeline_parallel_size * times
        grown.append(msgspec.structs.replace(sizes, pipeline_parallel_size=deeper, pipeline_partition=None))
        found = [one for one in (_consider(question, each) for each in grown) if one.fits]
        if found:
            return found
    return []


def _fitting(question: Question, ranks: tuple[RankReport, ...], larger: list[Alternative]) -> str:
    tight = min(ranks, key=lambda one: (one.kv_tokens or 0, -one.total_weight_bytes))
    usable = in_bytes(question.usable_memory or 0)
    weights = in_bytes(tight.total_weight_bytes)
    if (tight.kv_bytes_free or 0) <= 0:
        text = f"rank {tight.rank} does not fit: its weights take {weights}, and {usable} of a GPU may be used"
    else:
        text = (
            f"rank {tight.rank} has room for {tight.kv_tokens:,} tokens of KV beside {weights} of weights in {usable}, "
            f"less than one sequence of {question.max_model_len:,}: lower --max-model-len"
        )
    if not larger:
        return text
    return f"{text}; what fits: " + " or ".join(f"{one.flags} on {one.num_gpus} GPUs" for one in larger)


# ----------------------------------------------------------------------------------------------------------- judging


def _valid(question: Question, sizes: ParallelConfig) -> bool:
    try:
        question.resized(sizes)
    except InvalidConfig:
        return False
    return True


def _consider(question: Question, sizes: ParallelConfig) -> Alternative:
    """What ``sizes`` would be like. The ranks with tp_rank 0 of the first replica hold the most of everything."""
    product = sizes.tensor_parallel_size * sizes.pipeline_parallel_size * sizes.data_parallel_size
    try:
        other = question.resized(sizes)
    except InvalidConfig as error:
        reason, change = error.text, _change(question.parallel, sizes)
        return Alternative(flags=size_flags(sizes), change=change, num_gpus=product, valid=False, reason=reason)
    layout = other.layout
    heaviest = [layout.global_rank(0, stage) for stage in range(layout.pipeline_parallel_size)]
    placement = other.first_placement()
    ranks = rank_reports(
        layout,
        other.spec,
        placement,
        other.dtype,
        other.kv_cache_dtype,
        heaviest,
        other.device,
        staged=other.stages_experts,
    )
    ranks = with_memory(other, ranks)
    rooms = [one.kv_tokens for one in ranks if one.kv_tokens is not None]
    return Alternative(
        flags=size_flags(sizes),
        change=_change(question.parallel, sizes),
        num_gpus=layout.num_ranks,
        valid=True,
        reason=_effect(question, other),
        weight_bytes=max(one.total_weight_bytes for one in ranks),
        kv_tokens=min(rooms) * layout.num_replicas if rooms else None,
        fits=all(one.fits for one in ranks) if rooms else None,
    )


def _effect(question: Question, other: Question) -> str:
    before, after, spec, layout = question.parallel, other.parallel, other.spec, other.layout
    parts = []
    if after.data_parallel_size != before.data_parallel_size:
        replicas = counted(after.data_parallel_size, "engine replica")
        own = ", each with a KV cache of its own" if after.data_parallel_size > 1 else ""
        parts.append(f"{replicas} of {counted(layout.world_size, 'GPU')}{own}")
        if spec.is_moe:
            how = "experts spread" if after.enable_expert_parallel else "each expert cut"
            parts.append(f"{how} over {counted(layout.expert_group_size, 'rank')}")
    if after.tensor_parallel_size != before.tensor_parallel_size:
        tp = after.tensor_parallel_size
        parts.append(f"each layer cut over {tp} GPUs" if tp > 1 else "no layer cut by tensor parallelism")
        if spec.num_kv_heads < layout.attn_tp_size:
            times = layout.attn_tp_size // spec.num_kv_heads
            parts.append(f"the {'latent' if spec.mla else 'KV'} cache of every token held {times} times")
    if after.pipeline_parallel_size != before.pipeline_parallel_size:
        stages = layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
        sizes = sorted({end - start for start, end in stages})
        layers = " or ".join(map(str, sizes)) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
        parts.append(f"{counted(len(stages), 'stage')} of {layers} layers")
    return ", ".join(parts)
