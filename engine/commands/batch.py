"""``drumline generate --input-file``: many prompts from a file of JSON lines, results to another, line by line.

Memory does not grow with the input: as many lines are read as requests may run, and a result is written when its
request ends. A line that cannot be served becomes a line that says so; the others go on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, BinaryIO

import msgspec

from drumline.engine.client import AsyncEngine
from drumline.engine.commands.one_request import Prompt, error_record, run_request
from drumline.engine.config import EngineConfig
from drumline.engine.errors import DrumlineError, EngineClosed, InvalidRequest
from drumline.engine.sampling_params import SamplingParams

MOST_RUNNING = 8192
_ABOUT_THE_PROMPT = ("prompt", "prompt_token_ids", "request_id")


class Batch:
    """One run over an input file. ``finished`` and ``failed`` count lines."""

    def __init__(
        self,
        engine: AsyncEngine,
        lines: BinaryIO,
        out: BinaryIO,
        defaults: dict[str, Any],
        on_line: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.finished = 0
        self.failed = 0
        self._engine = engine
        self._lines = _numbered_lines(lines)
        self._out = out
        self._defaults = defaults
        self._on_line = on_line
        self._seen: dict[str, int] = {}

    async def run(self) -> None:
        """Until every line has been answered. Raises EngineClosed when the engine ends before, DrumlineError when the
        output cannot be written."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(most_running(self._engine.config)):
                    tasks.create_task(self._work())
        except BaseExceptionGroup as ended:
            raise _first(ended) from ended

    async def _work(self) -> None:
        for number, line in self._lines:
            await self._answer(number, line)

    async def _answer(self, number: int, line: bytes) -> None:
        request: Prompt | None = None
        try:
            request = self._read(number, line)
            records = await run_request(self._engine, request)
        except EngineClosed:
            raise
        except DrumlineError as error:
            self.failed += 1
            request_id = request.request_id if request is not None else f"line-{number}"
            self._write([{"request_id": request_id, "line": number, "error": error_record(error)}])
            self._on_line([])
            return
        self.finished += 1
        self._write(records)
        self._on_line(records)

    def _read(self, number: int, line: bytes) -> Prompt:
        request = parse_line(number, line, self._defaults)
        before = self._seen.setdefault(request.request_id, number)
        if before != number:
            valid = f"ids that stand once; line {before} has it too"
            raise InvalidRequest("request_id", request.request_id, valid)
        return request

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Whole lines, at once: whatever happens later, they stand in the file."""
        try:
            self._out.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
            self._out.flush()
        except OSError as error:
            raise _unwritable(error) from error


def most_running(config: EngineConfig) -> int:
    """Requests in flight: as many as can run, and some that wait so that no row stays empty."""
    return min(config.scheduler.max_num_seqs * config.parallel.data_parallel_size + 64, MOST_RUNNING)


def parse_line(number: int, line: bytes, defaults: dict[str, Any]) -> Prompt:
    """The request on one input line: prompt or prompt_token_ids, request_id, and sampling fields over ``defaults``.

    Raises InvalidRequest naming the field.
    """
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("line", f"line {number}: {error}", "a JSON object") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("line", f"line {number}: {type(fields).__name__}", "a JSON object")
    given = [name for name in ("prompt", "prompt_token_ids") if fields.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", " and ".join(given) or "none", "exactly one of prompt and prompt_token_ids")
    prompt = fields[given[0]]
    if not isinstance(prompt, str if given[0] == "prompt" else list):
        valid = "text" if given[0] == "prompt" else "a list of token ids"
        raise InvalidRequest(given[0], type(prompt).__name__, valid)
    request_id = fields.get("request_id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest("request_id", request_id, "a string")
    sampling = {name: value for name, value in fields.items() if name not in _ABOUT_THE_PROMPT}
    params = SamplingParams.from_mapping({**defaults, **sampling})
    return Prompt(f"line-{number}" if request_id is None else request_id, prompt, params)


async def open_lines(path: Path) -> tuple[BinaryIO, int]:
    """The file, and how many lines in it hold something. A pipe is read to its end first: it can be read only once,
    and a wait for its next line would stop the event loop.

    In a thread of its own, which nobody waits for when the command is interrupted: a pipe may never end.
    """
    with suppress(OSError):
        # Looked for by writing a file, which an interrupted thread would leave behind. Whoever needs it is told.
        gettempdir()
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[tuple[BinaryIO, int]] = loop.create_future()

    def work() -> None:
        found: tuple[BinaryIO, int] | OSError
        try:
            found = _open_and_count(path)
        except OSError as error:
            found = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, found)

    def settle(found: tuple[BinaryIO, int] | OSError) -> None:
        if opened.done():
            return
        if isinstance(found, OSError):
            opened.set_exception(found)
        else:
            opened.set_result(found)

    threading.Thread(target=work, name="reading the input file", daemon=True).start()
    return await opened


def _open_and_count(path: Path) -> tuple[BinaryIO, int]:
    lines: BinaryIO = path.open("rb")
    if not stat.S_ISREG(os.fstat(lines.fileno()).st_mode):
        with lines as pipe:
            lines = TemporaryFile()  # noqa: SIM115
            shutil.copyfileobj(pipe, lines)
        lines.seek(0)
    total = sum(1 for line in lines if line.strip())
    lines.seek(0)
    return lines, total


@contextmanager
def output_lines(path: Path) -> Iterator[BinaryIO]:
    """The file, empty. Raises DrumlineError when its end cannot be written, unless another error is on its way."""
    out = path.open("wb")
    try:
        yield out
    except BaseException:
        with suppress(OSError):
            out.close()
        raise
    try:
        out.close()
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> DrumlineError:
    return DrumlineError(f"the output file cannot be written: {error.strerror}")


def _numbered_lines(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The typed error among what ended the tasks, else whatever ended the first."""
    errors: list[BaseException] = [group]
    leaves: list[BaseException] = []
    while errors:
        error = errors.pop(0)
        if isinstance(error, BaseExceptionGroup):
            errors.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, DrumlineError)), leaves[0])
