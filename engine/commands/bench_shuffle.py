"""``drumline bench shuffle``: experts that move while streams run."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from drumline.engine.bench.shuffle import LEAST_WINDOW_S, ShufflePlan, ShuffleReport, ShuffleResult, run
from drumline.engine.client import AsyncEngine
from drumline.engine.commands.plain_tables import plain_table, print_line
from drumline.engine.commands.running import run_command, writing_stdout
from drumline.engine.commands.start_progress import StartProgress
from drumline.engine.config import EngineConfig, EPLBConfig, ParallelConfig
from drumline.engine.core.balance.plan import POLICIES
from drumline.protocol.messages import Event

DEFAULT_SIZES = (2, 4)
WINDOW_SIZE = 512
NEVER = 1 << 30
"""Plans are made when they are asked for."""


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="PATH", help='Model folder, or "demo".')
@click.option(
    "--data-parallel-size",
    "-dp",
    "sizes",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N ...",
    help=f"Replicas, with expert parallelism; default: {' '.join(map(str, DEFAULT_SIZES))}, one after another.",
)
@click.argument("more_sizes", nargs=-1, type=click.IntRange(min=1), metavar="")
@click.option("--tensor-parallel-size", "-tp", "tp", type=click.IntRange(min=1), default=1, metavar="N")
@click.option(
    "--num-redundant-experts",
    "redundant",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    metavar="N",
    help="Slots of a layer beyond one for each expert.",
)
@click.option("--streams", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Kept running.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=2 * LEAST_WINDOW_S),
    default=40.0,
    show_default=True,
    metavar="S",
    help="How long latencies are measured, experts moving in half of that.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(min=LEAST_WINDOW_S),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Of the windows that alternate, one with experts on the move and one without.",
)
@click.option("--policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True, help="Who plans.")
@click.option("--max-moved", type=float, metavar="F", help="Share of the slots per plan; default: 0.25.")
@click.option("--min-gain", type=float, metavar="F", help="Balancedness that a plan must gain; default: 0.01.")
@click.option("--bytes-per-step", type=int, metavar="N", help="Most that a rank sends beside a step; default: 8 MiB.")
@click.option(
    "--window-size",
    type=click.IntRange(min=32),
    default=WINDOW_SIZE,
    show_default=True,
    metavar="N",
    help="Steps that a load is counted over.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S", help="Of the traffic.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def shuffle(sizes: tuple[int, ...], more_sizes: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Experts that move while streams run: the balance they come to, and the latency that it costs.

    Starts an engine for each -dp, keeps streams of prose and then of code running, plans until nothing is worth
    moving, and measures the time between tokens while all experts move to and fro, and while they do not.
    """
    if more_sizes and not sizes:
        raise click.UsageError(f"what is {more_sizes[0]}? For replicas: -dp {more_sizes[0]}")
    plan = ShufflePlan(options["streams"], options["seconds"], options["window_s"], options["seed"])

    async def work() -> int:
        configs = [_config(size, options) for size in (*sizes, *more_sizes) or DEFAULT_SIZES]
        report = await _run(configs, plan)
        if as_json:
            with writing_stdout():
                sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
                sys.stdout.buffer.flush()
        else:
            show(report, Console())
        return 0

    run_command(work)


def _config(size: int, options: dict[str, Any]) -> EngineConfig:
    given = {name: options[name] for name in ("max_moved", "min_gain", "bytes_per_step") if options[name] is not None}
    window = options["window_size"]
    eplb = EPLBConfig(
        window_size=window,
        step_interval=NEVER,
        load_interval=max(window // 16, 1),
        num_redundant_experts=options["redundant"],
        policy=options["policy"],
        **given,
    )
    return EngineConfig(
        options["model"],
        parallel=ParallelConfig(
            data_parallel_size=size,
            tensor_parallel_size=options["tp"],
            enable_expert_parallel=True,
            enable_eplb=True,
            eplb_config=eplb,
        ),
    )


async def _run(configs: list[EngineConfig], plan: ShufflePlan) -> ShuffleReport:
    console = Console(stderr=True)
    shown: list[StartProgress] = []

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_event(event: Event) -> None:
        if shown:
            shown[-1](event)

    async def start(engine: AsyncEngine) -> None:
        shown.append(StartProgress(engine.config, console))
        with shown[-1]:
            await engine.start()

    return await run(configs, plan, start, say, on_event)


# -------------------------------------------------------------------------------------------------------------- tables


def show(report: ShuffleReport, console: Console) -> None:
    """Print it."""
    found = report.machine
    print_line(console, f"{report.model}; {found.cpu}, {found.cores} cores, Python {found.python}")
    for result in report.results:
        print_line(console, "")
        print_line(
            console,
            f"{result.ranks} ranks, data parallel {result.data_parallel_size}, expert parallel, "
            f"{result.num_redundant_experts} redundant experts, {result.policy}, {result.streams} streams, "
            f"{result.tokens_per_s:.0f} tokens/s",
        )
        print_line(
            console,
            f"balancedness: prose {result.balancedness_start:.3f}, after its plans {result.balancedness_prose:.3f}; "
            f"code {result.balancedness_turned:.3f}, after its plans {result.balancedness_code:.3f}",
        )
        console.print(_plans(result))
        print_line(console, _moves(result))
        console.print(_latencies(result))


def _plans(result: ShuffleResult) -> Table:
    table = plain_table("plan", "outcome", "before", "planned", "after", "slots", "KiB", "layers", "s", "steps")
    for one in result.plans:
        balance = (one.balancedness_before, one.balancedness_planned, one.balancedness_after)
        table.add_row(
            one.traffic,
            one.outcome,
            *(f"{number:.3f}" for number in balance),
            str(one.slots_moved),
            f"{one.bytes_moved / 1024:,.0f}",
            str(one.layers),
            f"{one.seconds:.3f}",
            str(one.steps),
        )
    return table


def _moves(result: ShuffleResult) -> str:
    moving = result.moving
    return (
        f"to and fro {moving.rebalances} times: {moving.slots_moved} slots, {moving.bytes_moved / 2**20:,.1f} MiB, "
        f"each {moving.seconds_each:.3f} s and {moving.steps_each} steps, {moving.mb_per_s:.1f} MB/s"
    )


def _latencies(result: ShuffleResult) -> Table:
    table = plain_table("between tokens", "p50 ms", "p99 ms")
    one = result.latency
    if one is not None:
        table.add_row("experts still", f"{one.p50_still_ms:.2f}", f"{one.p99_still_ms:.2f}")
        table.add_row("experts moving", f"{one.p50_moving_ms:.2f}", f"{one.p99_moving_ms:.2f}")
        quartiles = f"{one.p99_ratio:.2f} ({one.p99_ratio_low:.2f} to {one.p99_ratio_high:.2f})"
        table.add_row(f"ratio ({one.pairs} pairs of {one.window_s:.1f} s)", f"{one.p50_ratio:.2f}", quartiles)
    return table
