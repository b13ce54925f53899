"""``drumline bench scheduler``."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.table import Table

from drumline.engine.bench.scheduler import DEFAULT_ROWS, MAX_STEPS, SchedulerReport, run

_COLUMNS = ("total", "p99", "plan", "encode", "decode", "apply", "client", "maintain", "aligned", "aligned p99")


@click.command(short_help="coordinator work per decode step, in microseconds")
@click.option("--rows", type=click.IntRange(1, 65_536), multiple=True, help="Rows per replica; may be repeated.")
@click.option("--replicas", type=click.IntRange(1, 1024), help="Replicas in one lockstep group. [default: 1]")
@click.option(
    "--steps", type=click.IntRange(1, MAX_STEPS), default=300, show_default=True, help="Steps timed for each figure."
)
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON on stdout.")
def scheduler(rows: tuple[int, ...], replicas: int | None, steps: int, as_json: bool) -> None:
    """Time the coordinator's work for one decode step: plan + encode + decode of the replies + apply.

    Without options: 8 to 4,096 rows on one replica, then 64 replicas of 256 rows in one lockstep group.
    """
    report = run(rows or DEFAULT_ROWS, replicas, steps)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        Console().print(_table(report))


def _table(report: SchedulerReport) -> Table:
    machine = report.machine
    table = Table(
        title="coordinator work per decode step, microseconds (medians; 99th percentiles where named)",
        caption=f"{machine.cpu}, {machine.cores} cores, Python {machine.python}, numpy {machine.numpy}",
    )
    for name in ("replicas", "rows", *_COLUMNS, "plan bytes"):
        table.add_column(name, justify="right")
    for one in report.results:
        figures = (
            one.total_us,
            one.total_p99_us,
            one.plan_us,
            one.encode_us,
            one.decode_us,
            one.apply_us,
            one.client_us,
            one.maintain_us,
            one.aligned_total_us,
            one.aligned_p99_us,
        )
        shown = [f"{figure:,.1f}" for figure in figures]
        table.add_row(str(one.replicas), str(one.rows), *shown, f"{one.plan_bytes:,}")
    return table
