"""Which rank an engine lost, told from several reports that arrive within moments of each other.

When a rank dies inside a collective, its peers report broken connections within milliseconds, often before the death
itself is known. So the reports of a short while are gathered and one of them is named the cause: a process that ended
without having reported anything comes first, then the first report.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import msgspec

from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Exited, Fault

SETTLE_S = 0.25
"""How long after the first report others may arrive that explain it."""

TAIL_CHARACTERS = 4000

CONSEQUENCES = frozenset({"peer_lost", "group_timeout", "store", "epoch_aborted"})
"""Kinds of faults that tell of another rank: it went away, or did not come."""

_OF_PEERS = frozenset({"peer_lost", "group_timeout"})


@dataclass(frozen=True, slots=True)
class Loss:
    """The rank that was lost (-1: the supervisor) and why."""

    rank: int
    error: ErrorInfo


class Evidence:
    """Reports of one loss, until its verdict. After the verdict nothing more is gathered.

    Of what is known of one rank its own fault tells most, then how its process ended, then what the coordinator saw.
    """

    def __init__(self) -> None:
        self._faults: dict[int, ErrorInfo] = {}
        self._deaths: dict[int, ErrorInfo] = {}
        self._final: Loss | None = None
        self._first_at: float | None = None
        self._certain = False
        self._decided = False

    def __bool__(self) -> bool:
        return self._first_at is not None

    @property
    def decides_at(self) -> float | None:
        """When :meth:`verdict` has an answer, None while nothing is reported or once it has been given."""
        if self._first_at is None or self._decided:
            return None
        return self._first_at if self._certain else self._first_at + SETTLE_S

    @property
    def complainers(self) -> frozenset[int]:
        """The ranks that miss another one, where nothing else is known of the loss; else none."""
        if self._final is not None or self._deaths or any(one.kind not in _OF_PEERS for one in self._faults.values()):
            return frozenset()
        return frozenset(self._faults)

    def final(self, rank: int, error: ErrorInfo, now: float) -> None:
        """An error that nothing which may still arrive explains better."""
        self._note(now)
        self._certain = True
        if self._final is None:
            self._final = Loss(rank, error)

    def observed(self, rank: int, error: ErrorInfo, now: float) -> None:
        """The coordinator saw that ``rank`` is lost: its connection is gone or a deadline passed."""
        self._note(now)
        self._deaths.setdefault(rank, error)

    def fault(self, rank: int, incarnation: str, message: Fault, now: float) -> None:
        """A rank reports its own exception."""
        self._note(now)
        error = msgspec.structs.replace(
            message.error, rank=rank, incarnation=incarnation, epoch=max(message.epoch, message.error.epoch)
        )
        self._faults.setdefault(rank, error)

    def exited(self, incarnation: str, epoch: int, message: Exited, now: float) -> None:
        """A worker process ended."""
        self._note(now)
        if message.rank in self._faults:
            return
        how = f"code {message.code}"
        if message.signal:
            how = f"signal {message.signal} ({_signal_name(message.signal)})"
            self._certain = True
        text = f"the process of rank {message.rank} (pid {message.pid}) ended with {how}"
        tail = message.stderr_tail.strip()[-TAIL_CHARACTERS:]
        if tail:
            text += f"; its last output: {tail.splitlines()[-1]}"
        self._deaths[message.rank] = ErrorInfo(
            kind="request_failed", text=text, rank=message.rank, incarnation=incarnation, epoch=epoch, traceback=tail
        )

    def _note(self, now: float) -> None:
        if self._first_at is None:
            self._first_at = now

    def verdict(self, now: float) -> Loss | None:
        """The loss, once; None while there is none or more reports may explain it."""
        due = self.decides_at
        if due is None or now < due:
            return None
        self._decided = True
        if self._final is not None:
            return self._final
        if self._deaths:
            rank, error = next(iter(self._deaths.items()))
            return Loss(rank, self._faults.get(rank, error))
        # min keeps the order of arrival among equals.
        rank, error = min(self._faults.items(), key=lambda fault: fault[1].kind in CONSEQUENCES)
        return Loss(rank, error)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
