"""Ranks that a job script starts: what the script is told, and the token that its ranks show."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
from pathlib import Path

import msgspec

from drumline.engine.launch.order import Order
from drumline.protocol.messages import Event

TOKEN_FILE = "launch-token"


class ExternalLaunch(msgspec.Struct, frozen=True):
    """What starts the ranks that the engine does not start itself, by :meth:`command`.

    ``endpoint``: the coordinator's worker socket. ``token_file``: readable by this user alone, there before the engine
    tells that it waits. ``ranks``: the global ranks to start, each once, on any device of this machine.
    """

    endpoint: str
    token_file: str
    ranks: tuple[int, ...]

    def command(self, rank: int) -> list[str]:
        """The command line that starts ``rank``."""
        arguments = ["--coordinator", self.endpoint, "--rank", str(rank), "--token-file", self.token_file]
        return [sys.executable, "-m", "drumline.workers", *arguments]


def external_launch(order: Order) -> ExternalLaunch | None:
    """How the other ranks of ``order`` are started, None when all are started here."""
    ranks = order.config.parallel.external_ranks
    if not ranks:
        return None
    return ExternalLaunch(order.worker_endpoint, f"{order.runtime_dir}/{TOKEN_FILE}", ranks)


def launch_token(launch: ExternalLaunch) -> str:
    """The token of all ranks of ``launch``, which its file keeps for the coordinators that follow: ranks that live show
    it again. Drawn by the first one; only this user can read the file, which is whole as soon as it is there."""
    path = Path(launch.token_file)
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text(errors="replace").strip():
            return kept
    token = secrets.token_urlsafe(24)
    unfinished = Path(f"{path}.new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    unfinished.replace(path)
    return token


def waiting_event(launch: ExternalLaunch, awaited: tuple[int, ...]) -> Event:
    """What is told while the ranks ``awaited`` have not come. ``done`` of ``total`` are there."""
    ranks, them = ("rank", "it") if len(awaited) == 1 else ("ranks", "them")
    command = shlex.join(["python", *launch.command(0)[1:]]).replace("--rank 0", "--rank N")
    text = f"waiting for {len(awaited)} {ranks}: start {them} with `{command}` for N in {_listed(awaited)}"
    return Event("waiting", text, done=len(launch.ranks) - len(awaited), total=len(launch.ranks))


def _listed(ranks: tuple[int, ...]) -> str:
    """``0, 2, 4-7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
