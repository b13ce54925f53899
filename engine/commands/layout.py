"""``drumline layout``: which rank holds what of a model, from its config.json alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from drumline.engine.commands.running import one_line
from drumline.engine.layout_report.explain import Topic, explain
from drumline.engine.layout_report.question import COMPUTE_DTYPES, Question, Sizes, ask, parse_bytes
from drumline.engine.layout_report.report import LayoutReport, report
from drumline.protocol.errors import DrumlineError, InvalidConfig
from drumline.protocol.layout import PLACEMENT_STRATEGIES

_WIDTH = 100
_DTYPES = click.Choice(("auto", *COMPUTE_DTYPES))


def _partition(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"found {value!r}; valid: layers per stage, such as 15,15,16,15") from None


@click.command()
@click.option("--model", required=True, metavar="PATH|NAME", help='Folder, config.json, known model name, or "demo".')
@click.option("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="Ranks that share each layer.")
@click.option("--pipeline-parallel-size", "-pp", type=int, default=1, metavar="N", help="Pipeline stages.")
@click.option("--data-parallel-size", "-dp", type=int, default=1, metavar="N", help="Engine replicas.")
@click.option("--enable-expert-parallel", is_flag=True, help="Whole experts on each rank, over dp * tp ranks.")
@click.option("--expert-placement-strategy", type=click.Choice(PLACEMENT_STRATEGIES), default="linear")
@click.option("--enable-dp-attention", is_flag=True, help="Attention replicas where tp exceeds the KV heads.")
@click.option("--pipeline-partition", callback=_partition, metavar="N,N,...", help="Layers of each stage.")
@click.option("--num-gpus", type=int, metavar="N", help="GPUs that are there; default: as many as ranks.")
@click.option("--gpu-memory", metavar="80GiB", help="Memory of one GPU: says what is left for KV.")
@click.option("--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="Share of it to use; default: 0.9.")
@click.option("--dtype", type=_DTYPES, default="auto", help="Data type of weights; default: the checkpoint's.")
@click.option("--kv-cache-dtype", type=_DTYPES, default="auto", help="Data type of KV; default: as the weights.")
@click.option("--max-model-len", type=int, metavar="N", help="Longest context in tokens; default: the model's own.")
@click.option("--block-size", type=int, default=16, metavar="N", help="Tokens per KV block; default: 16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a picture.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page.")
@click.option("--explain", "explained", is_flag=True, help="Say in sentences why each size is what it is.")
def layout(as_json: bool, svg: Path | None, html: Path | None, explained: bool, **asked: Any) -> None:
    """Say which rank holds which layers, heads, experts and bytes of a model, by the code that loads them.

    From a config.json alone: no weights are read and no GPU is needed.
    """
    try:
        question = _question(**asked)
        answer = report(question)
        topics = explain(question, answer) if explained or html else ()
        _write(answer, topics, svg, html)
    except InvalidConfig as error:
        _fail(error, 2)
    except DrumlineError as error:
        _fail(error, 1)
    if as_json:
        more = {"explanation": topics} if explained else {}
        sys.stdout.buffer.write(answer.to_json(**more))
        sys.stdout.buffer.flush()
    elif explained:
        _print_topics(topics)
    elif svg is None and html is None:
        from drumline.engine.layout_report.table import table

        Console(width=_WIDTH if not sys.stdout.isatty() else None, highlight=False).print(table(answer))


def _question(gpu_memory: str | None, model: str, **asked: Any) -> Question:
    names = Sizes.__struct_fields__
    sizes = Sizes(**{name: asked.pop(name) for name in names})
    memory = None if gpu_memory is None else parse_bytes("gpu_memory", gpu_memory)
    return ask(model, sizes, gpu_memory=memory, **asked)


def _fail(error: DrumlineError, status: int) -> None:
    click.echo(f"drumline: {one_line(error)}", err=True)
    sys.exit(status)


def _write(answer: LayoutReport, topics: tuple[Topic, ...], svg: Path | None, html: Path | None) -> None:
    if svg is not None:
        from drumline.engine.layout_report.svg import svg_picture

        _save(svg, svg_picture(answer))
    if html is not None:
        from drumline.engine.layout_report.html import html_page

        _save(html, html_page(answer, topics))


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DrumlineError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}", err=True)


def _print_topics(topics: tuple[Topic, ...]) -> None:
    console = Console(width=_WIDTH if not sys.stdout.isatty() else None, highlight=False)
    for topic in topics:
        console.print(topic.title, style="bold", markup=False)
        console.print(topic.text, markup=False)
        console.print()
