"""The coordinator inside an app's own event loop (``inline=True``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from drumline.engine.coordinator import Coordinator
from drumline.engine.launch.order import Order
from drumline.engine.resolve import ResolvedConfig
from drumline.protocol.errors import ErrorInfo


class InlineCoordinator:
    """A coordinator that runs as a task of this loop; ``on_failed`` is told when it ends by an error."""

    def __init__(self, order: Order, resolved: ResolvedConfig, on_failed: Callable[[ErrorInfo], None]) -> None:
        self._on_failed = on_failed
        self._coordinator = Coordinator(order, resolved)
        self._task = asyncio.get_running_loop().create_task(self._coordinator.run(), name="inline coordinator")
        self._task.add_done_callback(self._ended)

    def owner_gone(self, error: ErrorInfo) -> None:
        """The supervisor has ended, and the workers with it."""
        self._coordinator.end(error.text, error)

    async def close(self, reason: str) -> None:
        """End the coordinator and wait until its sockets are closed."""
        self._coordinator.end(reason)
        await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[ErrorInfo | None]) -> None:
        if task.cancelled():
            self._on_failed(ErrorInfo(kind="engine_closed", text="the inline coordinator was cancelled"))
            return
        failure = task.exception()
        if failure is not None:
            self._on_failed(ErrorInfo(kind="engine_closed", text=f"the inline coordinator died: {failure!r}"))
            return
        error = task.result()
        if error is not None:
            self._on_failed(error)
