"""``drumline bench eplb``: what a balancing policy makes of expert loads, recorded or made up."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from drumline.engine.bench.eplb_loads import SYNTHETIC, synthetic_loads
from drumline.engine.commands.running import complain
from drumline.engine.core.balance.plan import POLICIES
from drumline.engine.expert_records import F64, read_loads, save_placements
from drumline.engine.layout_report.memory import in_bytes
from drumline.engine.layout_report.question import parse_bytes
from drumline.protocol.errors import DrumlineError, InvalidConfig

if TYPE_CHECKING:
    from drumline.engine.bench.eplb import EplbReport, EplbSetup, EplbTrace

_FILE = click.Path(dir_okay=False, path_type=Path)
_SIZE = click.IntRange(min=1)
_SHARE = click.FloatRange(0.0, 1.0)
_WIDTH = 100
_MADE = {"layers": 58, "experts": 256, "times": 12, "seed": 0}


@click.command("eplb")
@click.option("--loads", type=_FILE, metavar="FILE.npz", help="Loads: (layers, experts) or (time, layers, experts).")
@click.option("--key", metavar="NAME", help="Which array of it; may be left out when there is one.")
@click.option("--synthetic", type=click.Choice(SYNTHETIC), help="Loads made by a seeded generator, in place of a file.")
@click.option("--layers", type=_SIZE, metavar="N", help="Of synthetic loads; default: 58.")
@click.option("--experts", type=_SIZE, metavar="N", help="Of synthetic loads; default: 256.")
@click.option("--times", type=_SIZE, metavar="N", help="Of synthetic loads; default: 12.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of synthetic loads; default: 0.")
@click.option("--slots", type=_SIZE, required=True, metavar="S", help="Physical experts of a layer, over all ranks.")
@click.option("--ranks", type=_SIZE, required=True, metavar="P", help="Expert parallel ranks.")
@click.option("--nodes", type=_SIZE, default=1, show_default=True, metavar="N", help="Hosts that share them out.")
@click.option("--groups", type=_SIZE, default=1, show_default=True, metavar="G", help="Expert groups of the model.")
@click.option("--policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True)
@click.option("--max-moved", type=_SHARE, default=0.25, show_default=True, metavar="F", help="Share of slots per plan.")
@click.option(
    "--min-gain", type=_SHARE, default=0.01, show_default=True, metavar="F", help="Balancedness worth moving."
)
@click.option(
    "--window", type=_SIZE, metavar="N", help="Loads that a plan sees, its own the last; default: 8, as in an engine."
)
@click.option(
    "--expert-bytes",
    default="44040192",
    show_default=True,
    metavar="42MiB",
    help="One expert of one layer; DeepSeek-R1's.",
)
@click.option(
    "--placements-out", type=_FILE, metavar="OUT.npz", help="Write physical_to_logical (time, layers, slots)."
)
@click.option("--report", "page", type=_FILE, metavar="FILE.html", help="Write a page with pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def eplb(as_json: bool, page: Path | None, placements_out: Path | None, **flags: Any) -> None:
    """Plan expert placements at each time of a series of loads, each from the placement before.

    The first starts from all experts in order, then the redundant copies of experts 0, 1, 2...
    """
    try:
        for path in (page, placements_out):
            _check_folder(path)
        loads, source = _loads(flags)
        report, trace = _planned(loads, _setup(flags), source)
        if placements_out is not None:
            save_placements(placements_out, trace.placements)
            click.echo(f"wrote {placements_out}", err=True)
        if page is not None:
            _write_page(page, report, trace)
    except InvalidConfig as error:
        complain(error)
        sys.exit(2)
    except DrumlineError as error:
        complain(error)
        sys.exit(1)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        sys.stdout.buffer.flush()
    else:
        _print(report)


def _check_folder(path: Path | None) -> None:
    """A long run that could not be written at its end is not begun."""
    if path is not None and not path.parent.is_dir():
        raise DrumlineError(f"{path} cannot be written: no such folder")


def _loads(flags: dict[str, Any]) -> tuple[F64, str]:
    """The loads, and in words where they are from."""
    path, kind = flags["loads"], flags["synthetic"]
    if (path is None) == (kind is None):
        raise click.UsageError("give --loads FILE.npz or --synthetic KIND" + (", not both" if path else ""))
    if kind is not None:
        if flags["key"] is not None:
            raise click.UsageError("--key is for --loads")
        made = {name: default if flags[name] is None else flags[name] for name, default in _MADE.items()}
        return synthetic_loads(kind, **made), f"synthetic {kind} load, seed {made['seed']}"
    for name in _MADE:
        if flags[name] is not None:
            raise click.UsageError(f"--{name} is for --synthetic; a file has its own")
    key = flags["key"]
    return read_loads(path, key), f"{path.name}, {key}" if key else path.name


def _setup(flags: dict[str, Any]) -> EplbSetup:
    from drumline.engine.bench.eplb import EplbSetup

    names = ("slots", "ranks", "nodes", "groups", "policy", "max_moved", "min_gain", "window")
    expert_bytes = parse_bytes("expert_bytes", flags["expert_bytes"])
    given = {name: flags[name] for name in names if flags[name] is not None}
    return EplbSetup(**given, expert_bytes=expert_bytes)


def _planned(loads: F64, setup: EplbSetup, source: str) -> tuple[EplbReport, EplbTrace]:
    from drumline.engine.bench.eplb import run

    console = Console(stderr=True)
    columns = (
        TextColumn("planning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(loads))
        return run(loads, setup, source, lambda _: progress.advance(task))


def _write_page(path: Path, report: EplbReport, trace: EplbTrace) -> None:
    from drumline.engine.bench.eplb_page import eplb_page

    try:
        path.write_text(eplb_page(report, trace), encoding="utf-8")
    except OSError as error:
        raise DrumlineError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}", err=True)


def _print(report: EplbReport) -> None:
    setup = report.setup
    table = Table(
        title=f"{report.source}: {report.layers} layers, {report.experts} experts in {setup.slots} slots on "
        f"{setup.ranks} ranks in {setup.nodes} nodes; {setup.policy}; {report.machine.cpu}",
        box=None,
        padding=(0, 0, 0, 1),
    )
    for name in (
        "t",
        "solve\nms",
        "balancedness\nbefore",
        "\nafter",
        "on the\nnext load",
        "slots\nmoved",
        "share",
        "moved",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    slots = report.layers * setup.slots
    for one in report.plans:
        following = "" if one.balancedness_next is None else f"{one.balancedness_next:.4f}"
        figures = (f"{one.balancedness_before:.4f}", f"{one.balancedness:.4f}", following, f"{one.slots_moved:,}")
        share = f"{100 * one.slots_moved / slots:.1f} %"
        table.add_row(str(one.t), f"{one.solve_ms:.1f}", *figures, share, in_bytes(one.bytes_moved))
    Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False).print(table)
    for one in report.plans:
        click.echo(f"t {one.t}: {one.reason}")
    solves = [one.solve_ms for one in report.plans]
    click.echo(
        f"median solve {median(solves):.1f} ms; {sum(one.slots_moved for one in report.plans):,} slots, "
        f"{in_bytes(sum(one.bytes_moved for one in report.plans))} moved; "
        f"balancedness {np.mean([one.balancedness for one in report.plans]):.4f} on average, "
        f"{np.mean([one.balancedness_start for one in report.plans]):.4f} had nothing been moved"
    )
