"""``drumline layout``: which rank holds what of a model, from its config.json alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from drumline.engine.commands.parallel_options import SIZE_OPTIONS, parallel_config, refuse_not_yet
from drumline.engine.commands.running import one_line
from drumline.engine.config import DTYPES, CacheConfig, EngineConfig
from drumline.engine.first_placement import first_placement
from drumline.engine.layout_report.explain import Topic, explain
from drumline.engine.layout_report.question import Question, ask, parse_bytes
from drumline.engine.layout_report.report import LayoutReport, report
from drumline.protocol.errors import DrumlineError, InvalidConfig

_WIDTH = 100
_ONE_OF = ", ".join(DTYPES)


def _size_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(SIZE_OPTIONS):
        command = option(command)
    return refuse_not_yet(command)


@click.command()
@click.option("--model", required=True, metavar="PATH|NAME", help='Folder, config.json, known model name, or "demo".')
@_size_options
@click.option("--num-gpus", type=int, metavar="N", help="GPUs that are there; default: as many as ranks.")
@click.option("--gpu-memory", metavar="80GiB", help="Memory of one GPU: says what is left for KV.")
@click.option("--gpu-memory-utilization", type=float, metavar="F", help="Share of it to use; default: 0.9.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="What the ranks compute on.")
@click.option("--dtype", metavar="NAME", help=f"Of weights: {_ONE_OF}; default: the checkpoint's.")
@click.option("--kv-cache-dtype", metavar="NAME", help=f"Of KV: {_ONE_OF}; default: the weights'.")
@click.option("--max-model-len", type=int, metavar="N", help="Longest context in tokens; default: the model's own.")
@click.option("--block-size", type=int, metavar="N", help="Tokens per KV block; default: 16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a picture.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page.")
@click.option("--explain", "explained", is_flag=True, help="Say in sentences why each size is what it is.")
def layout(as_json: bool, svg: Path | None, html: Path | None, explained: bool, **flags: Any) -> None:
    """Say which rank holds which layers, heads, experts and bytes of a model, by the code that loads them.

    From a config.json alone: no weights are read and no GPU is needed.
    """
    try:
        question = _question(flags)
        spec = question.spec
        answer = report(question, first_placement(question.parallel, spec, question.layout) if spec.is_moe else None)
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


def _question(flags: dict[str, Any]) -> Question:
    def given(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: flags[name] for name in names if flags[name] is not None}

    config = EngineConfig(
        **given(("model", "dtype", "max_model_len")),
        parallel=parallel_config(flags),
        cache=CacheConfig(**given(("block_size", "kv_cache_dtype", "gpu_memory_utilization"))),
    )
    memory = flags["gpu_memory"]
    memory = None if memory is None else parse_bytes("gpu_memory", memory)
    return ask(config, num_gpus=flags["num_gpus"], gpu_memory=memory, device=flags["device"])


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
