"""``drumline chaos``: random faults on a real engine under load."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.status import Status

from drumline.engine.commands.chaos_report import show_report
from drumline.engine.commands.engine_options import engine_config, engine_options
from drumline.engine.commands.running import FAILED, run_command, writing_stdout
from drumline.engine.commands.start_progress import StartProgress
from drumline.engine.testing.chaos import Chaos, ChaosPlan, ChaosReport

_LOOK_S = 0.25
_SAID_EVERY_S = 30.0
_SIZES = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel")
_EPILOG = """\b
Exit status: 0 nothing was lost, repeated or wrong; 1 something was, or a typed error; 2 wrong usage;
130 after Ctrl-C.
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--minutes", type=click.FloatRange(min=0.05), default=1.0, show_default=True, metavar="N", help="How long."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Of faults, requests and engine.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Mean time between faults.",
)
@click.option(
    "--streams", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Requests kept running."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    metavar="N",
    help="Longest of them, in generated tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@engine_options
def chaos(minutes: float, seed: int, every: float, streams: int, max_tokens: int, as_json: bool, **flags: Any) -> None:
    """Random faults on a real engine under load: is anything lost, repeated or wrong?

    Half of the streams are greedy, half sampled. Each is first run undisturbed, then again and again while ranks are
    killed, stopped, hung and made to fail, messages lost and damaged, the coordinator killed, the journal's disk
    filled; what it gives is compared token by token. The demo model runs on two replicas with expert parallelism
    unless sizes are given.
    """
    if flags["model"] == "demo" and all(flags[name] is None for name in _SIZES):
        flags |= {"data_parallel_size": 2, "enable_expert_parallel": True}
    plan = ChaosPlan(minutes * 60.0, seed, every, streams, max_tokens)

    async def work() -> int:
        config = engine_config(flags, seed)
        console = Console(stderr=True)
        progress = StartProgress(config, console)
        report = await _run(Chaos(config, plan, _quiet(progress)), progress, console)
        if as_json:
            _print_json(report)
        else:
            show_report(report, Console())
        return 0 if report.clean else FAILED

    run_command(work)


def _quiet(progress: StartProgress) -> Any:
    """Faults are wanted here: only the start is told of, event by event."""

    def take(event: Any) -> None:
        if event.kind in ("starting", "loading", "waiting", "warning"):
            progress(event)

    return take


async def _run(run: Chaos, progress: StartProgress, console: Console) -> ChaosReport:
    shown = asyncio.Event()
    with contextlib.ExitStack() as starting:
        starting.enter_context(progress)

        def ready() -> None:
            starting.close()
            shown.set()

        working = asyncio.create_task(run.run(ready))
        showing = asyncio.create_task(_show(run, shown, console))
        try:
            return await working
        finally:
            showing.cancel()
            working.cancel()
            await asyncio.gather(showing, working, return_exceptions=True)


async def _show(run: Chaos, started: asyncio.Event, console: Console) -> None:
    """A live line on a terminal, now and then a plain one elsewhere."""
    await started.wait()
    live: Status | None = console.status("learning what is right") if console.is_terminal else None
    if live is not None:
        live.start()
    said_at = 0.0
    try:
        while True:
            await asyncio.sleep(_LOOK_S)
            if not run.started_at:
                continue
            if live is not None:
                live.update(progress_line(run))
            elif time.monotonic() - said_at >= _SAID_EVERY_S:
                said_at = time.monotonic()
                console.print(progress_line(run), markup=False, highlight=False, soft_wrap=True)
    finally:
        if live is not None:
            live.stop()


def progress_line(run: Chaos) -> str:
    """Where a run stands."""
    passed = min(time.monotonic() - run.started_at, run.plan.seconds)
    faults = sum(count.happened for count in run.faults.values())
    text = f"{int(passed) // 60}:{int(passed) % 60:02} of {run.plan.seconds / 60:g} min, {faults} faults"
    if run.load is not None:
        tally = run.load.tally
        text += f", {tally.requests} requests, {tally.lost} lost, {tally.duplicated} repeated, {tally.wrong} wrong"
    return text + (f"; last: {run.last}" if run.last else "")


def _print_json(report: ChaosReport) -> None:
    with writing_stdout():
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        sys.stdout.buffer.flush()
