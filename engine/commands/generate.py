"""``drumline generate``: continue prompts, on the terminal, as JSON, or from file to file."""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from drumline.engine.client import AsyncEngine
from drumline.engine.commands.batch import Batch, open_lines, output_lines
from drumline.engine.commands.engine_options import engine_config, engine_options
from drumline.engine.commands.one_request import Prompt, Tally, run_request
from drumline.engine.commands.running import FAILED, complain, one_line, run_command, writing_stdout
from drumline.engine.commands.sampling_options import sampling_fields, sampling_options
from drumline.engine.commands.start_progress import StartProgress
from drumline.engine.commands.transcript import Transcript
from drumline.engine.config import EngineConfig
from drumline.engine.errors import DrumlineError, EngineClosed, InvalidRequest
from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams

_EPILOG = """\b
Exit status: 0 done; 1 a typed error, or lines of a batch that failed; 2 wrong usage; 130 after Ctrl-C.

\b
Input lines:  {"prompt": TEXT} or {"prompt_token_ids": [..]}, and if wanted "request_id" and sampling fields,
              which go before the flags: {"prompt": "Once", "max_tokens": 8, "temperature": 0}
Output lines: what --json lists under "outputs"; or {"request_id", "line", "error"} for a line that failed.
--json:       {model, outputs: [{request_id, index, prompt, prompt_token_ids, token_ids, text, finish_reason,
              ttft_s, latency_s, ...}], timings: {start_s, total_s, tokens_per_s}, counters}
"""


@click.command(epilog=_EPILOG)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT ...", help="What to continue; may be repeated.")
@click.argument("more_prompts", nargs=-1, metavar="")
@click.option(
    "--prompt-token-ids", "id_lists", multiple=True, metavar="ID,ID,...", help="The same as token ids; may be repeated."
)
@click.option(
    "--input-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts as JSON lines."
)
@click.option("--output-file", type=click.Path(dir_okay=False, path_type=Path), help="Where results go, as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@click.option(
    "--seed",
    type=int,
    metavar="N",
    help="Seed of the engine and of every request that brings none: the output of a prompt is then a function of "
    "prompt and seed, whatever runs beside it. Default: the engine's seed is 0, and it draws one for each request.",
)
@sampling_options
@engine_options
def generate(
    prompts: tuple[str, ...],
    more_prompts: tuple[str, ...],
    id_lists: tuple[str, ...],
    input_file: Path | None,
    output_file: Path | None,
    as_json: bool,
    seed: int | None,
    **flags: Any,
) -> None:
    """Continue prompts with a model, on an engine that is started for it.

    Text streams to stdout; progress and errors go to stderr.
    """
    if more_prompts and not prompts:
        raise click.UsageError(f"what is {more_prompts[0]!r}? For a prompt: --prompt {more_prompts[0]!r}")
    prompts += more_prompts
    _check_usage(prompts, id_lists, input_file, output_file)

    async def work() -> int:
        fields = sampling_fields(flags, seed)
        params = SamplingParams.from_mapping(fields)
        config = engine_config(flags, seed)
        if input_file is not None and output_file is not None:
            return await _run_file(config, input_file, output_file, fields, as_json)
        given: list[str | list[int]] = [*prompts, *(_token_ids(text) for text in id_lists)]
        requests = [Prompt(f"prompt-{number}", prompt, params) for number, prompt in enumerate(given, 1)]
        return await _run_prompts(config, requests, as_json)

    run_command(work)


def _check_usage(
    prompts: tuple[str, ...], id_lists: tuple[str, ...], input_file: Path | None, output_file: Path | None
) -> None:
    given = bool(prompts or id_lists)
    if given and input_file is not None:
        raise click.UsageError("--prompt and --input-file cannot be combined: put the prompts into the file")
    if not given and input_file is None:
        raise click.UsageError("nothing to continue: give --prompt TEXT or --input-file FILE")
    if (input_file is None) != (output_file is None):
        raise click.UsageError("--input-file and --output-file go together")
    if input_file is not None and output_file is not None and _same_file(input_file, output_file):
        raise click.UsageError("--output-file would overwrite --input-file")


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise InvalidRequest("prompt-token-ids", text, "whole numbers with commas between them") from None


# ------------------------------------------------------------------------------------------ prompts on the command line


async def _run_prompts(config: EngineConfig, requests: list[Prompt], as_json: bool) -> int:
    console = Console(stderr=True)
    tally = Tally()
    progress = StartProgress(config, console)
    engine = AsyncEngine(config, on_event=progress)
    try:
        with progress:
            await engine.start()
        tally.generating()
        transcript = None if as_json else _transcript(requests)
        try:
            results = await asyncio.gather(
                *(_run_one(engine, request, at, transcript) for at, request in enumerate(requests))
            )
        except BaseException:
            if transcript is not None:
                transcript.interrupted()
            raise
        records = [record for found in results if not isinstance(found, DrumlineError) for record in found]
        tally.count(records)
        timings = tally.timings(progress.start_s)
        failures = [found for found in results if isinstance(found, DrumlineError)]
        if as_json and (records or not failures):
            await _print_json(engine, records, timings)
        _tell_failures(requests, results)
        if records:
            _tell_speed(console, tally, timings)
        return FAILED if failures else 0
    finally:
        await engine.close()


async def _run_one(
    engine: AsyncEngine, request: Prompt, at: int, transcript: Transcript | None
) -> list[dict[str, Any]] | DrumlineError:
    """The records of one request, or the error that ended it: the other prompts go on."""

    def show(out: RequestOutput) -> None:
        if transcript is not None:
            transcript.add(at * request.params.n + out.index, out.text_delta)
            if out.finished:
                transcript.end(at * request.params.n + out.index)

    try:
        return await run_request(engine, request, show)
    except DrumlineError as error:
        if transcript is not None:
            for index in range(request.params.n):
                transcript.end(at * request.params.n + index)
        return error


def _transcript(requests: list[Prompt]) -> Transcript:
    """A terminal shows each prompt in bold with its continuation after it; elsewhere the text stands alone."""
    terminal = sys.stdout.isatty()
    labels, leads = [], []
    for request in requests:
        for index in range(request.params.n):
            labels.append(_label(request, index))
            leads.append(click.style(request.prompt, bold=True) if terminal and isinstance(request.prompt, str) else "")
    return Transcript(labels, leads, sys.stdout)


def _label(request: Prompt, index: int) -> str:
    shown = repr(request.prompt) if isinstance(request.prompt, str) else str(request.prompt)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return f"{shown} [{index}]" if request.params.n > 1 else shown


def _tell_failures(requests: list[Prompt], results: list[list[dict[str, Any]] | DrumlineError]) -> None:
    """One line for each error; one line for all where the engine itself ended."""
    told: set[str] = set()
    for request, found in zip(requests, results, strict=True):
        if isinstance(found, DrumlineError) and (line := one_line(found)) not in told:
            told.add(line)
            complain(found, request.request_id if len(requests) > 1 and not isinstance(found, EngineClosed) else "")


def _tell_speed(console: Console, tally: Tally, timings: dict[str, float]) -> None:
    text = f"{tally.tokens} tokens, {timings['tokens_per_s']:.0f} tokens/s"
    console.print(text, markup=False, highlight=False)


# ------------------------------------------------------------------------------------------------------ file to file


async def _run_file(
    config: EngineConfig, input_file: Path, output_file: Path, fields: dict[str, Any], as_json: bool
) -> int:
    console = Console(stderr=True)
    tally = Tally()
    progress = StartProgress(config, console)
    engine = AsyncEngine(config, on_event=progress)
    collected: list[dict[str, Any]] = []
    with ExitStack() as files:
        lines, total, out = await _open(files, input_file, output_file)
        try:
            with progress:
                await engine.start()
            tally.generating()
            bar = files.enter_context(_bar(console))
            task = bar.add_task("lines", total=total, tokens=0)

            def on_line(records: list[dict[str, Any]]) -> None:
                tally.count(records)
                bar.update(task, advance=1, tokens=tally.tokens)
                if as_json:
                    collected.extend(records)

            batch = Batch(engine, lines, out, fields, on_line)
            try:
                await batch.run()
            finally:
                bar.stop()
                _tell_batch(console, batch, total)
            if as_json:
                await _print_json(engine, collected, tally.timings(progress.start_s))
            return FAILED if batch.failed else 0
        finally:
            await engine.close()


async def _open(files: ExitStack, input_file: Path, output_file: Path) -> tuple[BinaryIO, int, BinaryIO]:
    """The lines, how many there are, and where results go."""
    try:
        lines, total = await open_lines(input_file)
        files.callback(lines.close)
        return lines, total, files.enter_context(output_lines(output_file))
    except OSError as error:
        found = f"{error.filename or input_file} ({error.strerror})"
        raise InvalidRequest("file", found, "files that can be opened") from None


def _bar(console: Console) -> Progress:
    """A progress bar on a terminal; nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _tell_batch(console: Console, batch: Batch, total: int) -> None:
    text = f"{batch.finished} of {total} lines finished, {batch.failed} failed"
    console.print(text, markup=False, highlight=False)


async def _print_json(engine: AsyncEngine, records: list[dict[str, Any]], timings: dict[str, float]) -> None:
    """One document, with a line for each output, so that it can be read by a person and by grep too."""
    model = _json(engine.model_info.served_model_name)
    counters = _json((await engine.status()).counters)
    outputs = ",\n    ".join(_json(record) for record in records)
    document = f'{{\n  "model": {model},\n  "outputs": [\n    {outputs}\n  ],\n'
    document += f'  "timings": {_json(timings)},\n  "counters": {counters}\n}}\n'
    with writing_stdout():
        sys.stdout.buffer.write(document.encode())
        sys.stdout.buffer.flush()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
