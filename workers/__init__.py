"""A rank: model, layers, KV cache, groups and the process around it. Never imports ``drumline.engine``.

For classes that extend a rank: ``from drumline.workers import Worker, remote``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Worker", "remote"]

if TYPE_CHECKING:
    from drumline.workers.remote_methods import remote
    from drumline.workers.worker import Worker
else:

    def __getattr__(name: str) -> object:
        # Imported when asked for: a rank's control thread runs before torch is loaded, and the forkserver sets
        # variables that numpy reads when it is.
        if name == "Worker":
            from drumline.workers.worker import Worker

            return Worker
        if name == "remote":
            from drumline.workers.remote_methods import remote

            return remote
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
