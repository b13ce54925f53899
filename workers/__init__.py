"""A rank: model, layers, KV cache, groups and the process around it. Never imports ``drumline.engine``.

For classes that extend a rank: ``from drumline.workers import Worker, remote``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drumline.workers.remote_methods import remote

if TYPE_CHECKING:
    from drumline.workers.worker import Worker as Worker

__all__ = ["Worker", "remote"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: it needs torch, and a rank's control thread runs before torch is there.
    if name == "Worker":
        from drumline.workers.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
