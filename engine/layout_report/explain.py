"""Why each size of a layout is what it is, in sentences with its own numbers."""

from __future__ import annotations

import msgspec

from drumline.engine.layout_report import explain_experts, explain_memory
from drumline.engine.layout_report.explain_experts import Topic
from drumline.engine.layout_report.memory import counted, inclusive, listed
from drumline.engine.layout_report.question import Question
from drumline.engine.layout_report.report import LayoutReport
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.shards import attention_replicas

__all__ = ["Topic", "explain"]


def explain(question: Question, report: LayoutReport) -> tuple[Topic, ...]:
    """One short paragraph per topic that this model and layout have."""
    topics: list[Topic | None] = [
        _world(report),
        _idle(report),
        _attention(question, report),
        _kv_heads(question, report),
    ]
    topics += [_attention_dp(question, report), _layers(report), explain_experts.dense(report)]
    topics += [explain_experts.routed(report), explain_experts.shared(report), explain_experts.lockstep(report)]
    topics += [explain_memory.weights(report), explain_memory.kv_cache(question, report)]
    return tuple(topic for topic in topics if topic is not None)


def _world(report: LayoutReport) -> Topic:
    c = report.config
    dp, pp, tp = c.data_parallel_size, c.pipeline_parallel_size, c.tensor_parallel_size
    text = (
        f"{counted(c.num_ranks, 'rank')} = dp {dp} x pp {pp} x tp {tp}, one GPU each. Rank = (dp_rank * {pp} + "
        f"pp_rank) * {tp} + tp_rank, so the {tp * pp} ranks of an engine replica stand together, and in it the {tp} "
        "of a stage."
    )
    if c.num_ranks > 1:
        text += " " + "; ".join(
            f"{name} groups {_groups(report, name)}" for name in ("tp", "pp", "dp") if len(report.groups[name][0]) > 1
        )
        text += "."
    return Topic("The world", text)


def _groups(report: LayoutReport, kind: str) -> str:
    groups = report.groups[kind]
    shown = " ".join(f"[{listed(group)}]" for group in groups[:4])
    return shown if len(groups) <= 4 else f"{shown} and {len(groups) - 4} more"


def _idle(report: LayoutReport) -> Topic:
    c = report.config
    if not report.idle_gpus:
        return Topic("Idle GPUs", f"None: {counted(c.num_gpus, 'GPU')}, {counted(c.num_ranks, 'rank')}.")
    text = (
        f"A GPU without a rank does nothing: no size grows by itself to fill a machine. dp {c.data_parallel_size} x pp "
        f"{c.pipeline_parallel_size} x tp {c.tensor_parallel_size} makes {counted(c.num_ranks, 'rank')}, so of "
        f"{c.num_gpus} GPUs {report.idle_gpus} stay idle (GPU {listed(report.idle_gpu_ids)}). "
    )
    if report.suggestion:
        text += f"{report.suggestion}."
    refused = [one for one in report.alternatives if not one.valid]
    if refused:
        text += " Not possible: " + "; ".join(f"{one.change} ({one.reason})" for one in refused) + "."
    return Topic("Idle GPUs", text)


def _attention(question: Question, report: LayoutReport) -> Topic:
    c, model, first = report.config, report.model, report.ranks[0]
    attn_tp, replicas = c.attention_tensor_parallel_size, len(report.replicas)
    heads = inclusive(first.q_heads)
    if attn_tp > 1:
        text = (
            f"Attention weights are sharded over the {attn_tp} ranks of an attention replica: {model.num_heads} query "
            f"heads / {attn_tp} = {first.q_heads[1] - first.q_heads[0]} per rank (rank 0 has {heads}), with their rows "
            "of the projections and their columns of the output projection. "
        )
    else:
        text = f"Attention weights are whole on every rank of a stage: all {model.num_heads} heads. "
    if replicas > 1:
        copies = f"dp {c.data_parallel_size}"
        if c.attention_data_parallel_size > 1:
            copies += f" x attention dp {c.attention_data_parallel_size}"
        text += (
            f"They are replicated over {copies}: {replicas} copies of every layer's attention, one per attention "
            "replica, each for requests of its own. "
        )
    else:
        text += "There is one copy of them, since there is one attention replica. "
    if model.latent_attention:
        mla = question.spec.mla
        parts = "kv_a_proj" if mla is None or not mla.q_lora_rank else "q_a_proj and kv_a_proj"
        text += f"The projections down to a latent ({parts}) belong to no head and are whole on every rank. "
    if model.num_experts:
        text += "Expert parallelism changes nothing of that: it concerns the experts alone."
    return Topic("Attention weights", text.strip())


def _kv_heads(question: Question, report: LayoutReport) -> Topic:
    c, model, first = report.config, report.model, report.ranks[0]
    attn_tp, heads = c.attention_tensor_parallel_size, model.num_kv_heads
    if model.latent_attention and question.spec.mla is not None:
        mla = question.spec.mla
        text = (
            f"Latent attention (MLA) caches one vector per token and layer, shared by all {model.num_heads} heads: "
            f"{mla.kv_lora_rank} + {mla.qk_rope_head_dim} = {mla.kv_lora_rank + mla.qk_rope_head_dim} numbers. It "
            "cannot be cut by heads"
        )
        text += f", so each of the {attn_tp} ranks of a replica holds the same cache." if attn_tp > 1 else "."
    elif first.kv_replicated:
        times = attn_tp // heads
        text = (
            f"There are {counted(heads, 'KV head')} for {attn_tp} ranks, and a head is not cut: each rank holds one, "
            f"and {times} ranks hold the same one. So tp {attn_tp} takes {times} times the KV memory that tp {heads} "
            "takes for the same tokens."
        )
    else:
        each = first.kv_heads[1] - first.kv_heads[0]
        over = f" over {counted(attn_tp, 'rank')}" if attn_tp > 1 else ""
        text = f"{counted(heads, 'KV head')}{over}: {each} per rank, none held twice in a replica."
    return Topic("KV heads", text)


def _attention_dp(question: Question, report: LayoutReport) -> Topic | None:
    c, model = report.config, report.model
    tp, heads = c.tensor_parallel_size, counted(model.num_kv_heads, "KV head")
    parts = attention_replicas(tp, model.num_kv_heads)
    if c.attention_data_parallel_size > 1:
        text = (
            f"tp {tp} exceeds the {heads}, so the {tp} ranks of a stage form max(tp // KV heads, 1) = {parts} "
            f"attention replicas of {c.attention_tensor_parallel_size}. Each has rows and a KV cache of its own, so no "
            "KV is held twice; the price is that attention weights are. The networks after it stay sharded over all "
            f"{tp} ranks: rows are gathered before them and scattered after."
        )
    elif c.enable_dp_attention:
        text = f"It is asked for and changes nothing: max(tp {tp} // {heads}, 1) = 1 attention replica."
    elif parts > 1 and _with_attention_dp(question) is not None:
        text = (
            f"Off. With --enable-dp-attention the {tp} ranks of a stage would form {parts} attention replicas of "
            f"{tp // parts}, each with a KV cache of its own: an engine replica would hold {parts} times as many "
            f"tokens in the same KV memory, and each rank {parts} times the heads of attention weights."
        )
    else:
        return None
    return Topic("Attention data parallel", text)


def _with_attention_dp(question: Question) -> Question | None:
    try:
        return question.resized(msgspec.structs.replace(question.parallel, enable_dp_attention=True))
    except InvalidConfig:
        return None


def _layers(report: LayoutReport) -> Topic:
    c, model = report.config, report.model
    partition = c.pipeline_partition
    stages = len(partition)
    tied = model.tie_word_embeddings
    if stages == 1:
        text = f"One stage has all {model.num_layers} layers, the embedding and the output head"
        text += ", which are one matrix" if tied else ""
    else:
        share, more = divmod(model.num_layers, stages)
        even = f"{share} each"
        if more:
            left = "the one left over goes to the last stage but one"
            if more > 1:
                left = f"the {more} left over go to one stage each from the last but one backwards"
            even += f", and {left}, because the first also embeds and the last has the output head"
        sizes = ", ".join(map(str, partition))
        spread = [share + (stage in _longer(stages, more)) for stage in range(stages)]
        rule = even if list(partition) == spread else "as --pipeline-partition says"
        text = f"{model.num_layers} layers over {stages} stages: {rule}: {sizes}. The embedding is on the first stage"
        text += ", the output head on the last"
        text += "; they are one matrix, which both stages hold" if tied else ""
    attn_tp = c.attention_tensor_parallel_size
    text += f". Their {model.vocab_size:,} rows are sharded over {attn_tp} ranks." if attn_tp > 1 else "."
    return Topic("Layers", text)


def _longer(stages: int, more: int) -> set[int]:
    return {(stages - 2 - i) % stages for i in range(more)}
