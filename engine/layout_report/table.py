"""The report as text for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from drumline.engine.layout_report.memory import counted, in_bytes, in_parameters, inclusive, listed
from drumline.engine.layout_report.ranks import RankReport
from drumline.engine.layout_report.report import LayoutReport
from drumline.protocol.weights import KINDS

MANY = 16
"""Ranks that are shown one by one; more are folded."""
_KIND_TITLES = {"shared_experts": "shared", "embedding": "embed"}


class Row:
    """Ranks shown in one line: ``first`` stands for all. ``exact``: they hold the very same, not only as much."""

    def __init__(self, first: RankReport, exact: bool = True) -> None:
        self.first = first
        self.ranks = [first.rank]
        self.exact = exact


def folded(ranks: tuple[RankReport, ...]) -> list[Row]:
    """One line per rank while there are few; then ranks that hold the same in one, then those that hold as much."""
    if len(ranks) <= MANY:
        return [Row(one) for one in ranks]
    rows = _fold(ranks, _held, exact=True)
    return rows if len(rows) <= MANY else _fold(ranks, _amount, exact=False)


def _fold(ranks: tuple[RankReport, ...], key: Callable[[RankReport], object], exact: bool) -> list[Row]:
    rows: dict[object, Row] = {}
    for one in ranks:
        held = key(one)
        if held in rows:
            rows[held].ranks.append(one.rank)
        else:
            rows[held] = Row(one, exact)
    return list(rows.values())


def _held(one: RankReport) -> object:
    spans = (one.layers, one.vocab, one.q_heads, one.kv_heads, one.mlp, one.shared_mlp, one.expert_mlp)
    return spans, tuple(one.experts.items())


def _amount(one: RankReport) -> object:
    return one.layers, tuple(one.weight_bytes.items()), one.kv_bytes_per_token, one.num_experts


def table(report: LayoutReport) -> RenderableType:
    """Title, ranks, bytes by kind, and what to do about idle GPUs."""
    rows = folded(report.ranks)
    parts: list[RenderableType] = [Text(title(report), style="bold"), *(Text(note) for note in report.notes), Text()]
    parts += [_ranks(report, rows), Text(), _bytes(rows)]
    room = memory_line(report)
    if room:
        parts += [Text(), Text(room)]
    if report.suggestion:
        parts += [Text(), Text(report.suggestion, style="bold")]
    return Group(*parts)


def title(report: LayoutReport) -> str:
    """The model and its world in a line."""
    config, model = report.config, report.model
    sizes = f"dp {config.data_parallel_size} x pp {config.pipeline_parallel_size} x tp {config.tensor_parallel_size}"
    text = (
        f"{config.model}: {in_parameters(model.parameters)} parameters in {config.dtype} "
        f"on {counted(config.num_ranks, 'rank')} = {sizes}"
    )
    if config.enable_expert_parallel:
        text += f", ep {config.expert_parallel_size}"
    if config.attention_data_parallel_size > 1:
        text += f", attention dp {config.attention_data_parallel_size}"
    return text


def memory_line(report: LayoutReport) -> str:
    """What a GPU of the given memory has left for KV; empty when none was given or weights do not fit."""
    memory = report.config.gpu_memory_bytes
    if memory is None or any((one.kv_bytes_free or 0) <= 0 for one in report.ranks):
        return ""
    share = report.config.gpu_memory_utilization
    tokens = [one.kv_tokens or 0 for one in report.replicas]
    return (
        f"Of {in_bytes(memory)} per GPU {share:.0%} may be used; what weights leave holds KV for "
        f"{counted(sum(tokens), 'token')} over {counted(len(tokens), 'replica')}, "
        f"{counted(sum(one.max_sequences or 0 for one in report.replicas), 'sequence')} of "
        f"{report.config.max_model_len:,}. Activations and workspace come out of the same room."
    )


def _ranks(report: LayoutReport, rows: list[Row]) -> Table:
    config = report.config
    moe, dense = report.model.num_experts > 0, any(row.first.mlp != (0, 0) for row in rows)
    known = config.gpu_memory_bytes is not None
    split = config.attention_data_parallel_size > 1 and len(rows) == len(report.ranks)
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    titles = ["rank", "dp pp tp ep" if config.enable_expert_parallel else "dp pp tp"]
    titles += ["replica"] * split + ["layers", "q heads", "KV heads"] + ["mlp"] * dense
    titles += ["experts per layer"] * moe + ["weights", "KV/token"] + ["KV tokens"] * known
    for name in titles:
        shown.add_column(name, justify="right" if name in ("weights", "KV/token", "KV tokens") else "left")
    for row in rows:
        one = row.first
        cells = [_named(row.ranks), _place(row, config.enable_expert_parallel)]
        cells += [str(one.replica)] * split
        cells += [inclusive(one.layers), _span(row, one.q_heads), _kv_heads(report, row)]
        cells += [_span(row, one.mlp)] * dense
        cells += [experts_cell(report, one, row.exact)] * moe
        cells += [in_bytes(one.total_weight_bytes), f"{one.kv_bytes_per_token:,} B"]
        cells += [f"{one.kv_tokens or 0:,}" if (one.kv_bytes_free or 0) > 0 else "too big"] * known
        shown.add_row(*cells)
    return shown


def _named(ranks: list[int]) -> str:
    """Which ranks, or how many where the list is long: the bytes below are said of the same ones, listed."""
    names = listed(tuple(ranks))
    return names if len(names) <= len("1000-1023, 2000-2023") else f"{len(ranks)} ranks"


def _place(row: Row, whole_experts: bool) -> str:
    one = row.first
    if len(row.ranks) > 1:
        return f"stage {one.pp_rank}"
    places = (one.dp_rank, one.pp_rank, one.tp_rank, *((one.ep_rank,) if whole_experts else ()))
    return " ".join(f"{place:>2}" for place in places)


def _span(row: Row, span: tuple[int, int]) -> str:
    """The members where all ranks of the row hold the same ones, else how many each holds."""
    return inclusive(span) if row.exact or span[0] == span[1] else f"{span[1] - span[0]} each"


def _kv_heads(report: LayoutReport, row: Row) -> str:
    one = row.first
    if report.model.latent_attention:
        copies = report.config.attention_tensor_parallel_size
        return f"latent x{copies}" if copies > 1 else "latent"
    copies = report.config.attention_tensor_parallel_size // report.model.num_kv_heads
    return _span(row, one.kv_heads) + (f" x{copies}" if one.kv_replicated else "")


def experts_cell(report: LayoutReport, one: RankReport, exact: bool = True) -> str:
    """The experts of one MoE layer: which, or how many where they differ from layer to layer or rank to rank."""
    if not one.experts:
        return "-"
    if not report.config.enable_expert_parallel:
        size = one.expert_mlp[1] - one.expert_mlp[0]
        return f"{size} channels of each" if size < report.model.moe_intermediate_size else f"all {one.num_experts}"
    distinct = set(one.experts.values())
    if exact and len(distinct) == 1:
        (ids,) = distinct
        return f"{len(ids)}: {listed(ids)}" if len(ids) > 1 else f"1: {ids[0]}"
    return f"{one.num_experts} each"


def _bytes(rows: list[Row]) -> Table:
    """Weight bytes by kind; ranks that hold as much of everything in one line."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title="weights by kind", title_justify="left")
    kinds = [kind for kind in KINDS if any(kind in row.first.weight_bytes for row in rows)]
    shown.add_column("rank")
    for kind in kinds:
        shown.add_column(_KIND_TITLES.get(kind, kind), justify="right")
    merged: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for row in rows:
        merged.setdefault(tuple(row.first.weight_bytes.items()), []).extend(row.ranks)
    for held, ranks in merged.items():
        sizes = dict(held)
        shown.add_row(listed(tuple(sorted(ranks))), *(in_bytes(sizes[k]) if k in sizes else "-" for k in kinds))
    return shown
