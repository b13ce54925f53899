"""``drumline bench``: what drumline costs, measured on its real parts."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from drumline.engine.bench.scheduler import DEFAULT_ROWS, SchedulerReport, run

_COLUMNS = (
    ("replicas", "replicas"),
    ("rows", "rows"),
    ("total", "total_us"),
    ("p99", "total_p99_us"),
    ("plan", "plan_us"),
    ("encode", "encode_us"),
    ("decode", "decode_us"),
    ("apply", "apply_us"),
    ("aligned\np99", "aligned_p99_us"),
    ("client\nframes", "client_us"),
    ("upkeep", "maintain_us"),
)


@click.command()
@click.option(
    "--rows",
    "rows",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N ...",
    help=f"Running rows per replica; default: {' '.join(map(str, DEFAULT_ROWS))}, and 256 on 64 replicas.",
)
@click.argument("more_rows", nargs=-1, type=click.IntRange(min=1), metavar="")
@click.option("--replicas", type=click.IntRange(min=1), metavar="N", help="Replicas in one lockstep group; default: 1.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=300, show_default=True, metavar="N", help="Steps that are timed."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def scheduler(
    rows: tuple[int, ...], more_rows: tuple[int, ...], replicas: int | None, steps: int, as_json: bool
) -> None:
    """Coordinator work per decode step, in microseconds: plan, encode, decode of the replies, apply.

    Medians over the steps, on the real core and codec, with every row decoding and two steps in flight.
    """
    if more_rows and not rows:
        raise click.UsageError(f"what is {more_rows[0]}? For rows: --rows {more_rows[0]}")
    report = run((*rows, *more_rows) or DEFAULT_ROWS, replicas, steps)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        sys.stdout.buffer.flush()
    else:
        Console().print(_table(report))


def _table(report: SchedulerReport) -> Table:
    machine = report.machine
    title = f"microseconds per decode step; {machine.cpu}, {machine.cores} cores, Python {machine.python}"
    table = Table(title=title, box=None, padding=(0, 0, 0, 1))
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for result in report.results:
        table.add_row(*(_shown(getattr(result, field)) for _, field in _COLUMNS))
    return table


def _shown(value: Any) -> str:
    """One decimal where it says something."""
    return f"{value:.1f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
