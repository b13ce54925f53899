"""Where the bytes of a GPU go."""

from __future__ import annotations

from drumline.engine.layout_report.explain_experts import Topic
from drumline.engine.layout_report.memory import counted, in_bytes, in_parameters
from drumline.engine.layout_report.question import Question
from drumline.engine.layout_report.report import LayoutReport
from drumline.protocol.weights import DTYPE_BYTES


def weights(report: LayoutReport) -> Topic:
    """How much the ranks hold together, against the model once."""
    c, model = report.config, report.model
    totals = [one.total_weight_bytes for one in report.ranks]
    once = model.parameters * DTYPE_BYTES[c.dtype]
    heavy = max(report.ranks, key=lambda one: one.total_weight_bytes)
    kind, most = max(heavy.weight_bytes.items(), key=lambda item: item[1])
    text = f"{in_parameters(model.parameters)} parameters in {c.dtype} are {in_bytes(once)}"
    if len(totals) > 1:
        text += (
            f"; the {len(totals)} ranks hold {in_bytes(sum(totals))} together ({sum(totals) / once:.2f} times the "
            f"model), rank {heavy.rank} the most: {in_bytes(heavy.total_weight_bytes)}"
        )
    return Topic("Weights", f"{text}, of which {in_bytes(most)} are {kind.replace('_', ' ')}.")


def kv_cache(question: Question, report: LayoutReport) -> Topic:
    """Bytes of a token, and how many tokens a GPU has room for."""
    c, first = report.config, report.ranks[0]
    per_token = sorted({one.kv_bytes_per_token for one in report.ranks})
    layers = first.layers[1] - first.layers[0]
    entries = first.kv_bytes_per_token // layers // DTYPE_BYTES[c.kv_cache_dtype]
    shown = " to ".join(f"{size:,}" for size in dict.fromkeys((per_token[0], per_token[-1])))
    text = (
        f"A token takes {shown} bytes per rank: on rank 0 {layers} layers x {entries:,} numbers x "
        f"{DTYPE_BYTES[c.kv_cache_dtype]} bytes. "
    )
    usable = question.usable_memory
    if usable is None:
        return Topic("KV cache", text + "With --gpu-memory it is said how many tokens fit.")
    tight = min(report.ranks, key=lambda one: (one.kv_tokens or 0, -one.total_weight_bytes))
    text += (
        f"Of {in_bytes(c.gpu_memory_bytes or 0)} x {c.gpu_memory_utilization:g} = {in_bytes(usable)}, "
        f"rank {tight.rank} needs {in_bytes(tight.total_weight_bytes)} for weights"
    )
    free = tight.kv_bytes_free or 0
    if free <= 0:
        return Topic("KV cache", f"{text}: {in_bytes(-free)} too much. {_advice(report)}")
    rooms = [one for one in report.replicas if one.kv_tokens is not None]
    sequences = rooms[0].max_sequences or 0
    text += (
        f" and has {in_bytes(free)} left, {tight.kv_tokens:,} tokens, which is "
        f"{counted(sequences, 'sequence')} of {c.max_model_len:,} tokens per replica. A replica has as many as its "
        "smallest rank. Activations and workspace come out of the same room, so the real number is lower. "
    )
    return Topic("KV cache", f"{text}{_advice(report)}".strip())


def _advice(report: LayoutReport) -> str:
    """The suggestion, unless it stands under idle GPUs already."""
    return f"{report.suggestion}." if report.suggestion and not report.idle_gpus else ""
