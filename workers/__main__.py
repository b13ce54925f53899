"""``python -m drumline.workers --coordinator ENDPOINT --rank N --token-file FILE``: one worker, started by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drumline.workers.process import start_worker
from drumline.workers.torch_environment import leave_losses_to_us, sleep_while_waiting


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drumline.workers", description="Run one rank of a drumline engine.")
    parser.add_argument("--coordinator", required=True, metavar="ENDPOINT", help="the coordinator's worker socket")
    parser.add_argument("--rank", required=True, type=int, help="global rank, from 0")
    parser.add_argument("--token-file", required=True, type=Path, help="file with the launch token")
    parser.add_argument("--lifeline-fd", type=int, default=None, help="read end of the owner's lifeline pipe")
    parser.add_argument("--import-path", action="append", default=[], metavar="FOLDER", help="added to sys.path")
    options = parser.parse_args(arguments)
    if options.rank < 0:
        parser.error(f"argument --rank: found {options.rank}; valid: a whole number from 0")
    try:
        token = options.token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        parser.error(f"argument --token-file: {error}")
    sleep_while_waiting()
    leave_losses_to_us()
    # At the end: torch is still to be imported, and another folder's module must not take the place of one of its own.
    sys.path += [entry for entry in options.import_path if entry not in sys.path]
    watched = options.token_file if options.lifeline_fd is None else None
    return start_worker(options.rank, options.coordinator, token, options.lifeline_fd, watched)


if __name__ == "__main__":
    sys.exit(main())
