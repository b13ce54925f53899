"""When a rank that computes a step counts as stuck, and which of several is the one to blame; no I/O.

The limit for a step is ``max(2, 10 x recent median)`` seconds, where the median is taken of whole steps and, because a
prefill may hold hundreds of times the tokens of a decode, also of seconds per token; it is kept from one epoch to the
next. A rank may ask for a lease for the step that it is in (memory is touched and kernels are chosen in its first
ones): the step is not overdue while any rank that owes it holds one. Time counts from when the step could begin: it was
sent, and the step before it was done. With pipeline stages that is the time of one stage while the pipeline is full,
and of all of them while it fills, so the limit is multiplied by their number. Control calls run between steps: until a
rank has answered one, the steps behind it cannot begin, and that time does not count for as long as the call's lease
runs: its timeout, or 60 s where it is longer, because a call that was given up still runs to its end.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

LEAST_DEADLINE_S = 2.0
MEDIANS = 10.0
CALL_LEASE_S = 60.0
WINDOW = 64


class Progress(Protocol):
    """How far a rank has come, and when it was last heard."""

    @property
    def step(self) -> int: ...

    @property
    def collective(self) -> int: ...

    @property
    def inside(self) -> bool: ...

    @property
    def heard_at(self) -> float: ...


@dataclass(slots=True)
class OpenStep:
    """A step in flight: the ranks that have not replied, and the most tokens that any of them computes in it.
    ``begins_at``: when it could begin at the earliest, as far as steps before it do not say more."""

    step: int
    begins_at: float
    waiting: set[int]
    tokens: int


@dataclass(slots=True)
class OpenCall:
    """A control call that ``rank`` has not answered, sent behind step ``behind`` under a lease that runs ``until``."""

    rank: int
    behind: int
    until: float


@dataclass(slots=True)
class Lease:
    """A rank may take until ``until`` for the step that it is in, which is ``step`` at most."""

    step: int
    until: float


@dataclass(frozen=True, slots=True)
class Overdue:
    """``ranks`` have not replied to ``step`` after ``waited_s`` of at most ``limit_s`` seconds."""

    step: int
    ranks: tuple[int, ...]
    waited_s: float
    limit_s: float


class GroupClock:
    """The steps in flight of one lockstep group and how long its recent ones took. ``stages``: of its pipeline."""

    def __init__(self, setting_s: float | None, stages: int = 1) -> None:
        self._setting_s = setting_s
        self._stages = stages
        self._open: deque[OpenStep] = deque()
        self._calls: dict[int, OpenCall] = {}
        self._leases: dict[int, Lease] = {}
        self._sent = -1
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._per_token: deque[float] = deque(maxlen=WINDOW)
        self._done_at = 0.0

    def sent(self, rank: int, step: int, tokens: int, now: float) -> None:
        """``step`` was sent to ``rank``, which computes ``tokens`` tokens in it. Steps are sent in order."""
        last = self._open[-1] if self._open else None
        if last is None or last.step != step:
            last = OpenStep(step, now, set(), 0)
            self._open.append(last)
            self._sent = step
        last.waiting.add(rank)
        if tokens > last.tokens:
            last.tokens = tokens

    def called(self, rank: int, call_id: int, timeout_s: float, now: float) -> None:
        """A control call was sent to ``rank``, which runs it once it has run the steps that were sent before."""
        self._calls[call_id] = OpenCall(rank, self._sent, now + max(timeout_s, CALL_LEASE_S))

    def owes_answers(self, now: float) -> bool:
        """Whether a rank has a control call to answer, under a lease that still runs."""
        return any(call.until > now for call in self._calls.values())

    def answered(self, call_id: int, now: float) -> None:
        """The rank answered the call: the steps behind it can begin."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        freed_at = min(now, call.until)
        for entry in self._open:
            if entry.step > call.behind:
                entry.begins_at = max(entry.begins_at, freed_at)

    def lease(self, rank: int, step: int, seconds: float, now: float) -> None:
        """``rank`` may take ``seconds`` from now on for the step that it is in, ``step`` at most; with 0.0 it says that
        it takes no longer than others do."""
        held = self._leases.get(rank)
        if seconds > 0:
            self._leases[rank] = Lease(step, now + seconds)
        elif held is not None:
            # The reply to the step for which it was held may be on its way.
            held.until = min(held.until, now + LEAST_DEADLINE_S)

    def _begins_at(self, entry: OpenStep, now: float) -> float:
        """When ``entry`` could begin: now at the earliest while a rank runs a call that is ahead of it."""
        begins_at = max(entry.begins_at, self._done_at)
        for call in self._calls.values():
            if call.behind < entry.step and call.rank in entry.waiting:
                begins_at = max(begins_at, min(now, call.until))
        return begins_at

    def _leased_until(self, entry: OpenStep) -> float:
        """Until when a rank that owes ``entry`` holds a lease; 0.0: none does."""
        return max((held.until for rank, held in self._leases.items() if rank in entry.waiting), default=0.0)

    def owes(self, rank: int, step: int) -> bool:
        """Whether ``step`` is the oldest that ``rank`` has not replied to; replies come in order."""
        for entry in self._open:
            if rank in entry.waiting:
                return entry.step == step
        return False

    def done(self, rank: int, step: int, now: float) -> bool:
        """``rank`` replied to ``step``. Whether that was the last reply to it."""
        if self._calls:
            self._calls = {i: c for i, c in self._calls.items() if c.rank != rank or c.behind >= step}
        held = self._leases.get(rank)
        if held is not None and step >= held.step:
            del self._leases[rank]
        for entry in self._open:
            if entry.step == step:
                entry.waiting.discard(rank)
                if entry.waiting:
                    return False
                self._close_first(now)
                return True
        return False

    def _close_first(self, now: float) -> None:
        while self._open and not self._open[0].waiting:
            entry = self._open.popleft()
            took = now - max(entry.begins_at, self._done_at)
            self._done_at = now
            if took > 0:
                self._seconds.append(took)
                self._per_token.append(took / max(entry.tokens, 1))

    def forget(self) -> None:
        """A new epoch: nothing is in flight, nobody holds a lease."""
        self._open.clear()
        self._calls.clear()
        self._leases.clear()
        self._sent = -1

    @property
    def oldest_step(self) -> int:
        """The oldest step in flight, -1 without one."""
        return self._open[0].step if self._open else -1

    def age(self, rank: int, now: float) -> float:
        """Seconds since the oldest step that ``rank`` has not answered could begin; 0.0 without one."""
        for entry in self._open:
            if rank in entry.waiting:
                return max(now - self._begins_at(entry, now), 0.0)
        return 0.0

    def limit_s(self, tokens: int) -> float:
        """How long a step of ``tokens`` tokens may take."""
        if self._setting_s is not None:
            return self._setting_s
        if not self._seconds:
            return LEAST_DEADLINE_S
        median = max(statistics.median(self._seconds), statistics.median(self._per_token) * tokens)
        return max(LEAST_DEADLINE_S, MEDIANS * median * self._stages)

    def leave_s(self, now: float) -> float:
        """How long a rank may take from ``now`` on until it is out of the steps in flight."""
        limit = max((self.limit_s(entry.tokens) for entry in self._open), default=LEAST_DEADLINE_S)
        leased = max((self._leased_until(entry) - now for entry in self._open), default=0.0)
        return max(limit, leased)

    def due_at(self) -> float | None:
        """When the oldest step in flight is overdue, None without one."""
        if not self._open:
            return None
        entry = self._open[0]
        # As late as calls under their leases may make it.
        begins_at = self._begins_at(entry, math.inf)
        return max(begins_at + self.limit_s(entry.tokens), self._leased_until(entry))

    def overdue(self, now: float) -> Overdue | None:
        """The oldest step in flight, when it has had all its time."""
        due = self.due_at()
        if due is None or now < due:
            return None
        entry = self._open[0]
        waited = now - self._begins_at(entry, now)
        return Overdue(entry.step, tuple(sorted(entry.waiting)), waited, self.limit_s(entry.tokens))


def furthest_behind(ranks: Iterable[int], records: Mapping[int, Progress]) -> int:
    """Of ``ranks``, the one that the others wait for: least progress by (step, collective), then outside of a
    collective rather than inside (who is inside waits for somebody), then longest silent."""

    def progress(rank: int) -> tuple[int, int, bool, float]:
        record = records[rank]
        return record.step, record.collective, record.inside, record.heard_at

    return min(ranks, key=progress)
