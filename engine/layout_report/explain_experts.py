"""Why dense networks and experts lie where they do."""

from __future__ import annotations

import msgspec

from drumline.engine.layout_report.memory import inclusive, listed
from drumline.engine.layout_report.ranks import RankReport
from drumline.engine.layout_report.report import LayoutReport


class Topic(msgspec.Struct, frozen=True):
    """One paragraph: what it is about, and plain text."""

    title: str
    text: str


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def dense(report: LayoutReport) -> Topic | None:
    """Feed-forward networks of layers without experts."""
    model, tp = report.model, report.config.tensor_parallel_size
    layers = tuple(layer for layer in range(model.num_layers) if layer not in set(model.moe_layers))
    holders = [one for one in report.ranks if _width(one.mlp)]
    if not holders:
        return None
    which = "every layer" if len(layers) == model.num_layers else f"layers without experts ({listed(layers)})"
    text = f"The network of {which} has {model.intermediate_size:,} channels"
    if tp > 1:
        text += f", sharded over tp {tp}: {_width(holders[0].mlp):,} per rank"
    else:
        text += ", whole on its rank"
    if report.config.data_parallel_size > 1:
        text += f"; replicated over dp {report.config.data_parallel_size}"
    return Topic("MLP", text + ".")


def routed(report: LayoutReport) -> Topic | None:
    """Routed experts, with expert parallel on or off."""
    if not report.model.num_experts:
        return None
    return _whole(report) if report.config.enable_expert_parallel else _cut(report)


def _whole(report: LayoutReport) -> Topic:
    c, model = report.config, report.model
    holder = next(one for one in report.ranks if one.experts)
    ep, stages = c.expert_parallel_size, c.pipeline_parallel_size
    text = (
        f"ep = tp {c.tensor_parallel_size} x dp {c.data_parallel_size} = {ep}: all ranks that run a layer hold its "
        f"{model.num_experts} experts between them, whole ones. A token's attention is computed by the tp ranks of one "
        "engine replica; the experts it is routed to may be on any of these ranks. "
    )
    if stages > 1:
        text += (
            f"Only within a stage: a rank of another stage never runs the layer, so pp {stages} divides the layers "
            f"among stages and not the experts of a layer. "
        )
    text += f"Each rank holds {_counts(report)} of the {model.num_experts} experts of each MoE layer of its stage"
    text += f" ({c.expert_placement_strategy}: rank {holder.rank} has {listed(next(iter(holder.experts.values())))})"
    if c.attention_tensor_parallel_size > 1:
        text += f". The attention of these layers is still sharded over {c.attention_tensor_parallel_size} ranks"
    return Topic("Experts", f"{text}. {_redundant(report)}{_moe_layers(report)}")


def _counts(report: LayoutReport) -> str:
    counts = sorted({one.num_experts for one in report.ranks if one.experts})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} or {counts[-1]}"


def _redundant(report: LayoutReport) -> str:
    copies = sorted({expert for one in report.ranks for ids in one.redundant_experts.values() for expert in ids})
    if not copies:
        return "No expert has a redundant copy. "
    return (
        f"Each MoE layer has {report.config.num_redundant_experts} redundant copies, of experts "
        f"{listed(tuple(copies))} to begin with: a token goes to a copy on its own rank, else they share what comes. "
    )


def _moe_layers(report: LayoutReport) -> str:
    layers = report.model.moe_layers
    if len(layers) == report.model.num_layers:
        return "Every layer has experts."
    return f"Layers {listed(layers)} have experts."


def _cut(report: LayoutReport) -> Topic:
    c, model = report.config, report.model
    over = c.tensor_parallel_size * c.data_parallel_size
    if over == 1:
        text = f"All {model.num_experts} experts of a layer are whole on the one rank of its stage. "
        return Topic("Experts", text + _moe_layers(report))
    holder: RankReport = next(one for one in report.ranks if one.experts)
    text = (
        f"Expert parallel is off, so every expert is tensor-sharded over the dp {c.data_parallel_size} x tp "
        f"{c.tensor_parallel_size} = {over} ranks of its layer's stage: each rank holds "
        f"{_width(holder.expert_mlp):,} of {model.moe_intermediate_size:,} channels of all {model.num_experts} experts "
        f"(rank {holder.rank}: {inclusive(holder.expert_mlp)}). {_instead(model.num_experts, over)} "
    )
    return Topic("Experts", text + _moe_layers(report))


def _instead(experts: int, over: int) -> str:
    """What expert parallel would make of as many ranks."""
    share, more = divmod(experts, over)
    if not share:
        return (
            f"--enable-expert-parallel is not possible with {over} ranks: each would need one of the {experts} experts."
        )
    whole = "With --enable-expert-parallel each would hold whole experts instead"
    if more:
        return f"{whole}, {share} or {share + 1} of them per layer, so that some ranks hold more bytes than others."
    return f"{whole}, {share} of them per layer, in as many bytes."


def shared(report: LayoutReport) -> Topic | None:
    """Experts that every token passes through."""
    model, tp = report.model, report.config.tensor_parallel_size
    if not model.shared_intermediate_size:
        return None
    holder = next(one for one in report.ranks if one.experts)
    text = f"Every token passes through them ({model.shared_intermediate_size:,} channels), so they are laid out like "
    text += f"an MLP: sharded over tp {tp}, {_width(holder.shared_mlp):,} channels per rank" if tp > 1 else "an MLP"
    text += f"; replicated over dp {report.config.data_parallel_size}." if report.config.data_parallel_size > 1 else "."
    return Topic("Shared experts", text)


def lockstep(report: LayoutReport) -> Topic | None:
    """How engine replicas run beside each other."""
    dp = report.config.data_parallel_size
    if dp == 1:
        return None
    if report.model.num_experts:
        text = (
            f"The {dp} engine replicas hold the experts between them, so they step together: while one has work, the "
            "others run dummy steps."
        )
    else:
        text = f"The model has no experts: the {dp} engine replicas share nothing and step on their own."
    return Topic("Data parallel", text)
