"""What is seen on stderr while an engine starts."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from drumline.engine.commands.parallel_options import describe_sizes
from drumline.engine.config import EngineConfig
from drumline.protocol.messages import Event


class StartProgress:
    """A live line on a terminal, a plain line at the start and at the end elsewhere. Takes events for as long as the
    engine lives: a fault is told at any time."""

    def __init__(self, config: EngineConfig, console: Console) -> None:
        self._console = console
        self._what = _describe(config)
        self._live = console.is_terminal
        self._status: Status | None = None
        self._loading: dict[int, tuple[int, int]] = {}
        self._began = time.monotonic()
        self.start_s = 0.0

    def __call__(self, event: Event) -> None:
        """Takes one event of the engine."""
        if event.kind == "fault":
            self._say(f"fault: {event.text}")
        elif event.kind == "warning":
            self._say(f"warning: {event.text}")
        elif event.kind == "waiting":
            self._say(event.text)
        elif event.kind == "loading" and event.rank >= 0:
            self._loading[event.rank] = (event.done, event.total)
            self._show(self._loading_text())
        elif event.kind in ("starting", "loading") and event.text:
            self._show(event.text)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _loading_text(self) -> str:
        shares = [f"rank {rank} {_share(done, total)}" for rank, (done, total) in sorted(self._loading.items())]
        more = "" if len(shares) <= 8 else f" and {len(shares) - 8} more ranks"
        return "loading weights: " + ", ".join(shares[:8]) + more

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def __enter__(self) -> StartProgress:
        self._began = time.monotonic()
        text = f"starting {self._what}"
        if self._live:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._say(text)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        self.start_s = time.monotonic() - self._began
        if kind is None:
            self._say(f"{self._what}: ready in {self.start_s:.1f} s")


def _share(done: int, total: int) -> str:
    return f"{100 * done // total} %" if total else "0 %"


def _describe(config: EngineConfig) -> str:
    return f"{config.served_model_name or config.model} on {describe_sizes(config.parallel)}"
