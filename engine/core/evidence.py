"""What is known of a fault: how a process ended, whether what it computed may be why, and who only missed another."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import msgspec

from drumline.engine.core.members import RankRecord
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Exited, Fault

TAIL_CHARACTERS = 4000

CONSEQUENCES = frozenset({"peer_lost", "group_timeout", "store", "epoch_aborted"})
"""Kinds of faults that tell of another rank: it went away, or did not come."""

OF_PEERS = frozenset({"peer_lost", "group_timeout"})
"""Those that tell which other rank was waited for."""

INSIDE_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
"""Signals that a process brings upon itself by what it computes."""

SECOND_WITHIN = 100
"""A second exception of a rank within so many of its steps is one too many."""


def own_words(record: RankRecord, message: Fault) -> ErrorInfo:
    """What a rank says of its own fault."""
    return msgspec.structs.replace(
        message.error,
        rank=record.rank,
        incarnation=record.incarnation,
        epoch=max(message.epoch, message.error.epoch),
    )


def out_of_memory(error: ErrorInfo) -> bool:
    """Whether an exception says that memory was exhausted."""
    last = error.traceback.strip().rsplit("\n", 1)[-1]
    return any(
        name in text for text in (error.text, last) for name in ("OutOfMemoryError", "MemoryError", "out of memory")
    )


def second_within_steps(record: RankRecord) -> bool:
    """Note an exception of the rank. Whether its last one was within ``SECOND_WITHIN`` steps."""
    again = record.raised_at >= 0 and record.executed - record.raised_at <= SECOND_WITHIN
    record.raised_at = record.executed
    return again


def missed_within_steps(record: RankRecord) -> int:
    """Note that others missed the rank. How often they have, not counting times ``SECOND_WITHIN`` steps before the
    next."""
    if record.executed - record.missed_at > SECOND_WITHIN:
        record.missed = 0
    record.missed += 1
    record.missed_at = record.executed
    return record.missed


def from_inside(message: Exited) -> bool:
    """Whether what a process computed may be why it ended."""
    return message.signal in INSIDE_SIGNALS if message.signal else message.code != 0


def how_ended(message: Exited) -> str:
    """``signal 9 (SIGKILL)`` or ``code 1``."""
    if not message.signal:
        return f"code {message.code}"
    try:
        name = signal.Signals(message.signal).name
    except ValueError:
        name = "unknown"
    return f"signal {message.signal} ({name})"


def end_text(message: Exited) -> str:
    """Which process ended, and how."""
    return f"the process of rank {message.rank} (pid {message.pid}) ended with {how_ended(message)}"


def exit_error(record: RankRecord, message: Exited, kind: str) -> ErrorInfo:
    """The end of a process as an error, with the last that it printed."""
    text = end_text(message)
    tail = message.stderr_tail.strip()[-TAIL_CHARACTERS:]
    if tail:
        text += f"; its last output: {tail.splitlines()[-1]}"
    return ErrorInfo(
        kind=kind,
        text=text,
        retryable=True,
        rank=record.rank,
        incarnation=record.incarnation,
        epoch=record.epoch,
        step=max(record.step, record.replied),
        traceback=tail,
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank was when somebody first missed another."""

    rank: int
    step: int
    collective: int
    inside: bool
    heard_at: float


@dataclass(slots=True)
class Complaints:
    """Ranks of one group that missed another, until it is known whom, or nobody turns out to be gone.

    ``places``: of the ranks that computed then; none while an epoch formed."""

    errors: dict[int, ErrorInfo] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.errors)

    def add(self, error: ErrorInfo, computing: list[RankRecord]) -> None:
        """One more. ``computing``: the ranks that computed, none while an epoch forms."""
        if not self.errors:
            self.places = {
                one.rank: Place(one.rank, max(one.step, one.replied), one.collective, one.inside, one.heard_at)
                for one in computing
            }
        self.errors.setdefault(error.rank, error)

    def quote(self) -> str:
        """The first complaint, to be added to what else is known; empty without one."""
        if not self.errors:
            return ""
        rank, error = next(iter(self.errors.items()))
        return f"; rank {rank} reports: {error.text}"

    def clear(self) -> None:
        """They are explained."""
        self.errors.clear()
        self.places.clear()
