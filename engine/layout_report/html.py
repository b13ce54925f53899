"""A page of its own: the picture, the sentences, the table. It loads nothing, and every text in it is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from drumline.engine.layout_report.explain_experts import Topic
from drumline.engine.layout_report.memory import in_bytes, inclusive, listed
from drumline.engine.layout_report.ranks import RankReport
from drumline.engine.layout_report.report import LayoutReport
from drumline.engine.layout_report.svg import svg_picture
from drumline.engine.layout_report.table import experts_cell, title
from drumline.protocol.weights import KINDS

_STYLE = """
body { margin: 0; background: #fff; color: #1d2733; font: 15px/1.5 Inter, 'Segoe UI', Helvetica, Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px; }
.picture { overflow-x: auto; text-align: center; }
.picture svg { max-width: 100%; height: auto; }
h2 { font-size: 20px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 16px 0 2px; }
p { margin: 0; max-width: 76ch; }
.tables { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
th, td { padding: 4px 12px 4px 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #e7ebf0; }
td.n, th.n { text-align: right; }
"""


def html_page(report: LayoutReport, topics: tuple[Topic, ...]) -> str:
    """The report as one HTML document."""
    name = escape(title(report))
    paragraphs = "\n".join(f"<h3>{escape(one.title)}</h3>\n<p>{escape(one.text)}</p>" for one in topics)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<div class="picture">\n{svg_picture(report)}</div>\n'
        f"<h2>Why</h2>\n{paragraphs}\n<h2>Ranks</h2>\n"
        f'<div class="tables">\n{_ranks(report)}\n{_bytes(report)}\n</div>\n</main>\n</body>\n</html>\n'
    )


def _ranks(report: LayoutReport) -> str:
    moe, known = report.model.num_experts > 0, report.config.gpu_memory_bytes is not None
    head = ["rank", "dp", "pp", "tp", "ep", "replica", "layers", "q heads", "KV heads", "MLP"]
    head += ["experts per layer"] * moe + ["weights", "KV B/token"] + ["KV tokens"] * known
    rows = []
    for one in report.ranks:
        row = [one.rank, one.dp_rank, one.pp_rank, one.tp_rank, one.ep_rank, one.replica, inclusive(one.layers)]
        row += [inclusive(one.q_heads), _kv(report, one), inclusive(one.mlp)]
        row += [experts_cell(report, one)] * moe + [in_bytes(one.total_weight_bytes), f"{one.kv_bytes_per_token:,}"]
        row += [f"{one.kv_tokens or 0:,}"] * known
        rows.append(row)
    return _table(head, rows, numbers=("weights", "KV B/token", "KV tokens"))


def _kv(report: LayoutReport, one: RankReport) -> str:
    if report.model.latent_attention:
        return "latent"
    return inclusive(one.kv_heads) + (" (replicated)" if one.kv_replicated else "")


def _bytes(report: LayoutReport) -> str:
    kinds = [kind for kind in KINDS if any(kind in one.weight_bytes for one in report.ranks)]
    merged: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for one in report.ranks:
        merged.setdefault(tuple(one.weight_bytes.items()), []).append(one.rank)
    rows = [
        [listed(tuple(ranks)), *(in_bytes(dict(held)[kind]) if kind in dict(held) else "" for kind in kinds)]
        for held, ranks in merged.items()
    ]
    names = [kind.replace("_", " ") for kind in kinds]
    return _table(["weights of rank", *names], rows, numbers=tuple(names))


def _table(head: list[str], rows: Iterable[Iterable[object]], numbers: tuple[str, ...]) -> str:
    right = [' class="n"' if name in numbers else "" for name in head]

    def line(tag: str, cells: Iterable[object]) -> str:
        inside = "".join(f"<{tag}{side}>{escape(str(cell))}</{tag}>" for cell, side in zip(cells, right, strict=True))
        return f"<tr>{inside}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', head)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
