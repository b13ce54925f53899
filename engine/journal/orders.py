"""What the loop orders of the thread that writes, and what that thread tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.batches import Batch


@dataclass(slots=True)
class Append:
    """Commit a batch. ``generation``: that in which it was ordered; in another one it is left out."""

    generation: int
    number: int
    batch: Batch


@dataclass(slots=True)
class Probe:
    """Try from now on whether the file can be written to."""

    generation: int


@dataclass(slots=True)
class Recover:
    """Write all of it down in place of what is there."""

    generation: int
    snapshot: tuple[RestoredRequest, ...]


@dataclass(slots=True)
class Complete:
    """Everything that was told is in the file once this is reached."""

    generation: int


@dataclass(slots=True)
class Limit:
    """Find the disk full, or no longer."""

    full: bool


@dataclass(slots=True)
class Close:
    """Commit what waits and end."""


Order: TypeAlias = Append | Probe | Recover | Complete | Limit | Close


@dataclass(frozen=True, slots=True)
class Reports:
    """What the thread tells; called in the thread. A generation is that of the order that it is about.

    ``committed()``: ``committed_number`` has grown. ``failed(generation, text)``: a transaction failed, and nothing is
    written until a Recover. ``writable(generation)``: the file can be written to again, and a Recover is awaited.
    ``recovered(generation)``: the snapshot is in the file. ``completed(generation)``: the Complete was reached.
    ``superseded(text)``: the file belongs to another coordinator; nothing is written any more. ``set_aside(text)``: a
    damaged file was replaced.
    """

    committed: Callable[[], None]
    failed: Callable[[int, str], None]
    writable: Callable[[int], None]
    recovered: Callable[[int], None]
    completed: Callable[[int], None]
    superseded: Callable[[str], None]
    set_aside: Callable[[str], None]
