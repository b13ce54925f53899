"""The answer to a question about a layout, as data: what ``drumline layout --json`` prints.

``layout.schema.json`` beside this file describes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from drumline.engine.layout_report.advice import Alternative, advise
from drumline.engine.layout_report.memory import with_memory
from drumline.engine.layout_report.question import Question
from drumline.engine.layout_report.ranks import RankReport, rank_reports
from drumline.protocol.layout import Layout
from drumline.protocol.messages import NO_NUMBERS
from drumline.protocol.placement import I32
from drumline.protocol.shards import layer_split
from drumline.protocol.weights import ModelWeights

SCHEMA_PATH = Path(__file__).with_name("layout.schema.json")


class LayoutConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, with every default filled in. ``pipeline_partition``: layers of each stage."""

    model: str
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    block_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    enable_expert_parallel: bool
    expert_placement_strategy: str
    enable_dp_attention: bool
    pipeline_partition: tuple[int, ...]
    expert_parallel_size: int
    attention_data_parallel_size: int
    attention_tensor_parallel_size: int
    num_ranks: int
    num_gpus: int
    gpu_memory_bytes: int | None
    gpu_memory_utilization: float
    enable_eplb: bool = False
    num_redundant_experts: int = 0


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of the model. ``parameters``: every tensor once. ``latent_attention``: MLA, whose KV cache is one
    latent per token. Experts are 0 for a dense model; ``moe_layers`` are indices."""

    architecture: str
    parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent_attention: bool
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    moe_layers: tuple[int, ...]


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """One attention replica: a KV cache and a set of rows. ``kv_tokens``: of its smallest rank, and
    ``max_sequences`` of the longest context that they hold; None when no GPU memory is known."""

    replica: int
    dp_rank: int
    attn_rank: int
    ranks: tuple[int, ...]
    reporting_rank: int
    kv_tokens: int | None
    max_sequences: int | None


class LayoutReport(msgspec.Struct, frozen=True, kw_only=True):
    """A world, rank by rank.

    ``idle_gpus``: how many GPUs have no rank, ``idle_gpu_ids`` which, if ranks take the first. ``suggestion``: what to
    add to use them, or what would fit when the weights do not; None when there is nothing to say. ``alternatives``:
    the layouts that were considered. ``groups``: every group of a kind once.
    """

    config: LayoutConfig
    model: ModelFacts
    notes: tuple[str, ...]
    idle_gpus: int
    idle_gpu_ids: tuple[int, ...]
    suggestion: str | None
    alternatives: tuple[Alternative, ...]
    groups: dict[str, tuple[tuple[int, ...], ...]]
    replicas: tuple[ReplicaReport, ...]
    ranks: tuple[RankReport, ...]

    def to_json(self, **more: Any) -> bytes:
        """Valid against the schema; one line per rank, replica and other top-level entry. ``more`` is appended."""
        entries: dict[str, Any] = {**msgspec.structs.asdict(self), **more}
        lines = (f"{json.dumps(name)}: {_lines(value)}" for name, value in entries.items())
        return ("{\n  " + ",\n  ".join(lines) + "\n}\n").encode()


def _lines(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
        return "[\n    " + ",\n    ".join(_spaced(one) for one in value) + "\n  ]"
    return _spaced(value)


def _spaced(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def report(question: Question, placement: I32 | None = None, slots: I32 = NO_NUMBERS) -> LayoutReport:
    """The answer. ``placement``: int32 (moe_layers, slots) of a running engine; None: the one a model starts with.
    ``slots``: int32 (ep ranks,), how many of them each rank has; empty: shared out evenly."""
    layout, spec = question.layout, question.spec
    if placement is None:
        placement = question.first_placement()
    dtype, kv_dtype = question.dtype, question.kv_cache_dtype
    reports = rank_reports(
        layout,
        spec,
        placement,
        dtype,
        kv_dtype,
        device=question.device,
        slots=slots,
        staged=question.stages_experts,
    )
    ranks = with_memory(question, reports)
    advice = advise(question, ranks)
    return LayoutReport(
        config=_config(question),
        model=_model(question),
        notes=question.notes,
        idle_gpus=question.num_gpus - layout.num_ranks,
        idle_gpu_ids=tuple(range(layout.num_ranks, question.num_gpus)),
        suggestion=advice.suggestion,
        alternatives=advice.alternatives,
        groups={kind: _distinct(ranks, kind) for kind in ranks[0].groups},
        replicas=_replicas(layout, ranks, question.max_model_len),
        ranks=ranks,
    )


def _distinct(ranks: tuple[RankReport, ...], kind: str) -> tuple[tuple[int, ...], ...]:
    return tuple(dict.fromkeys(one.groups[kind] for one in ranks))


def _replicas(layout: Layout, ranks: tuple[RankReport, ...], max_model_len: int) -> tuple[ReplicaReport, ...]:
    reports = []
    for replica in range(layout.num_replicas):
        members = layout.ranks_of_replica(replica)
        rooms = [room for rank in members if (room := ranks[rank].kv_tokens) is not None]
        tokens = min(rooms) if rooms else None
        reports.append(
            ReplicaReport(
                replica=replica,
                dp_rank=ranks[members[0]].dp_rank,
                attn_rank=ranks[members[0]].attn_rank,
                ranks=members,
                reporting_rank=layout.reporting_rank(replica),
                kv_tokens=tokens,
                max_sequences=None if tokens is None else tokens // max_model_len,
            )
        )
    return tuple(reports)


def _config(question: Question) -> LayoutConfig:
    layout, parallel = question.layout, question.parallel
    stages = layer_split(question.spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    return LayoutConfig(
        model=question.model,
        dtype=question.dtype,
        kv_cache_dtype=question.kv_cache_dtype,
        max_model_len=question.max_model_len,
        block_size=question.block_size,
        tensor_parallel_size=layout.tensor_parallel_size,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        enable_expert_parallel=layout.enable_expert_parallel,
        expert_placement_strategy=parallel.expert_placement_strategy,
        enable_dp_attention=parallel.enable_dp_attention,
        pipeline_partition=tuple(end - start for start, end in stages),
        expert_parallel_size=layout.ep_size,
        attention_data_parallel_size=layout.attention_data_parallel_size,
        attention_tensor_parallel_size=layout.attn_tp_size,
        num_ranks=layout.num_ranks,
        num_gpus=question.num_gpus,
        gpu_memory_bytes=question.gpu_memory,
        gpu_memory_utilization=question.gpu_memory_utilization,
        enable_eplb=parallel.enable_eplb,
        num_redundant_experts=parallel.eplb_config.num_redundant_experts,
    )


def _model(question: Question) -> ModelFacts:
    spec = question.spec
    moe = spec.moe
    return ModelFacts(
        architecture=spec.architecture,
        parameters=ModelWeights(spec).num_parameters(),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        latent_attention=spec.mla is not None,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=spec.tie_word_embeddings,
        num_experts=spec.num_experts,
        experts_per_token=moe.top_k if moe is not None else 0,
        moe_intermediate_size=moe.moe_intermediate_size if moe is not None else 0,
        shared_intermediate_size=moe.shared_intermediate_size if moe is not None else 0,
        moe_layers=spec.moe_layers,
    )
