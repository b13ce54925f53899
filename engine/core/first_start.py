"""A start that fails: until an engine is ready for the first time nobody is served, and what is wrong is told; no I/O.

A rank that says that it cannot load, or ends with a status, would do so again. One that is killed by a signal is
replaced even then.
"""

from __future__ import annotations

import msgspec

from drumline.engine.core.decisions import Ended, Output
from drumline.engine.core.evidence import CONSEQUENCES, exit_error, own_words
from drumline.engine.core.losses import NUMERIC, SETTLE_S
from drumline.engine.core.members import RankRecord
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Exited, Fault


class FirstStart:
    """``over``: the engine was ready, or goes on with what an earlier one has begun."""

    def __init__(self, over: bool = False) -> None:
        self.over = over
        self._ending: ErrorInfo | None = None
        self.due_at: float | None = None

    def fails(self, error: ErrorInfo) -> list[Output]:
        """The end of the engine."""
        error = msgspec.structs.replace(error, kind="start_failed")
        return [Ended(error.text, error)]

    def exited(self, record: RankRecord, message: Exited, now: float) -> bool:
        """Whether the end of the rank's process ends the engine: once it has had a moment for its own words."""
        if self.over or message.signal:
            return False
        if self.due_at is None:
            self._ending = exit_error(record, message, "start_failed")
            self.due_at = now + SETTLE_S
        return True

    def fault(self, record: RankRecord, message: Fault) -> list[Output] | None:
        """The end of the engine, None for a fault that it survives."""
        if self.over or message.error.kind in CONSEQUENCES or message.error.kind == NUMERIC:
            return None
        record.last_fault = message.error.text
        return self.fails(own_words(record, message))

    def tick(self, now: float) -> list[Output]:
        """A process has ended without a word of its own."""
        if self._ending is None or self.due_at is None or now < self.due_at:
            return []
        ending, self._ending, self.due_at = self._ending, None, None
        return self.fails(ending)
