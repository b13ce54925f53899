"""Exceptions as data for the coordinator."""

from __future__ import annotations

import traceback

import msgspec

from drumline.protocol.errors import DrumlineError, ErrorInfo
from drumline.workers.identity import Identity
from drumline.workers.progress import Position


def describe(error: BaseException, identity: Identity, at: Position) -> ErrorInfo:
    """``error`` with its traceback, the rank it happened on, and where that rank was."""
    if isinstance(error, DrumlineError):
        info = error.info
    elif _is_out_of_memory(error):
        info = ErrorInfo(kind="out_of_memory", text=f"{type(error).__name__}: {error}")
    else:
        info = ErrorInfo(kind="internal", text=f"{type(error).__name__}: {error}")
    return msgspec.structs.replace(
        info,
        rank=identity.rank,
        incarnation=identity.incarnation,
        epoch=at.epoch if info.epoch < 0 else info.epoch,
        step=at.step if info.step < 0 else info.step,
        traceback="".join(traceback.format_exception(error)),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
