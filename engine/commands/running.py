"""How a command runs: its event loop, its signals, its exit status.

Status 0: done. 1: a typed error, told in one line on stderr. 2: wrong usage. 128 + n: ended by signal n (130 after
Ctrl-C), after everything that was started has been stopped. A second signal ends the process at once; what it started
ends with it through the lifelines.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click
import uvloop

from drumline.protocol.errors import DrumlineError, InvalidField

FAILED = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_command(work: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Runs ``work`` and exits with the status that it returns, or with that of what ended it."""
    _open_standard_streams()
    # A terminal that cannot show a character shows a question mark; it is no reason to stop.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_guarded(work))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _reader_is_gone()
    except OSError:
        # Told when it was written; what is left in the buffer must not be told again by Python at exit.
        _drop_stdout()
        status = status or FAILED
    sys.exit(status)


def _open_standard_streams() -> None:
    """Gives back what the caller has closed (``>&-``), lest a socket or a loop gets its number: libuv aborts on that.

    A closed stdin is empty, a closed stderr swallows, a closed stdout refuses to be written, as it does everywhere.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


@contextmanager
def writing_stdout() -> Iterator[None]:
    """A stdout that cannot be written is an error that is told; a reader that has left is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DrumlineError(f"stdout cannot be written: {error.strerror}") from error


async def _guarded(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    ended_by: list[int] = []

    def on_signal(number: int) -> None:
        if ended_by:
            os._exit(128 + number)
        ended_by.append(number)
        if task is not None:
            task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await work()
    except asyncio.CancelledError:
        if not ended_by:
            raise
        return 128 + ended_by[0]
    except BrokenPipeError:
        return _reader_is_gone()
    except DrumlineError as error:
        complain(error)
        return FAILED


def complain(error: DrumlineError, about: str = "") -> None:
    """One line on stderr: what kind of error, about what, and the figures."""
    click.echo(f"drumline: {about + ': ' if about else ''}{one_line(error)}", err=True)


def one_line(error: DrumlineError) -> str:
    """The error's kind and text in one line."""
    text = " ".join(error.text.split())
    if isinstance(error, InvalidField) and error.info.field and error.info.field not in text:
        text = f"{error.info.field}: {text}"
    return f"{type(error).__name__}: {text}"


def _reader_is_gone() -> int:
    """Whoever read stdout has left, as ``head`` does: say nothing, and let nothing be written at exit."""
    _drop_stdout()
    return 128 + signal.SIGPIPE


def _drop_stdout() -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.close(silence)
