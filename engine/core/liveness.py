"""When a rank that computes a step counts as stuck, and which of several is the one to blame; no I/O.

The limit for a step is ``max(2, 10 x recent median)`` seconds, where the median is taken of whole steps and, because a
prefill may hold hundreds of times the tokens of a decode, also of seconds per token. The first steps of an epoch run
under a lease: memory is touched and kernels are chosen there. Time counts from when the step could begin: it was sent,
and the step before it was done. With pipeline stages that is the time of one stage while the pipeline is full, and of
all of them while it fills, so the limit is multiplied by their number. Control calls run between steps: until a rank
has answered one, the steps behind it cannot begin, and that time does not count for as long as the call's lease runs:
its timeout, or that of first steps where it is longer, because a call that was given up still runs to its end.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from drumline.engine.core.members import RankRecord

LEAST_DEADLINE_S = 2.0
MEDIANS = 10.0
LEASE_STEPS = 8
LEASE_S = 60.0
WINDOW = 64


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
        self._sent = -1
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._per_token: deque[float] = deque(maxlen=WINDOW)
        self._done = 0
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
        self._calls[call_id] = OpenCall(rank, self._sent, now + max(timeout_s, LEASE_S))

    def answered(self, call_id: int, now: float) -> None:
        """The rank answered the call: the steps behind it can begin."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        freed_at = min(now, call.until)
        for entry in self._open:
            if entry.step > call.behind:
                entry.begins_at = max(entry.begins_at, freed_at)

    def _begins_at(self, entry: OpenStep, now: float) -> float:
        """When ``entry`` could begin: now at the earliest while a rank runs a call that is ahead of it."""
        begins_at = max(entry.begins_at, self._done_at)
        for call in self._calls.values():
            if call.behind < entry.step and call.rank in entry.waiting:
                begins_at = max(begins_at, min(now, call.until))
        return begins_at

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
            self._done += 1
            if took > 0:
                self._seconds.append(took)
                self._per_token.append(took / max(entry.tokens, 1))

    def forget(self) -> None:
        """A new epoch: nothing is in flight and the lease runs again."""
        self._open.clear()
        self._calls.clear()
        self._sent = -1
        self._done = 0

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
        limit = self._setting_s
        if limit is None:
            limit = LEAST_DEADLINE_S
            if self._seconds:
                median = statistics.median(self._seconds)
                median = max(median, statistics.median(self._per_token) * tokens)
                limit = max(limit, MEDIANS * median * self._stages)
        return max(limit, LEASE_S) if self._done < LEASE_STEPS else limit

    def overdue(self, now: float) -> Overdue | None:
        """The oldest step in flight, when it has had more than its time."""
        if not self._open:
            return None
        entry = self._open[0]
        waited = now - self._begins_at(entry, now)
        limit = self.limit_s(entry.tokens)
        if waited <= limit:
            return None
        return Overdue(entry.step, tuple(sorted(entry.waiting)), waited, limit)


def furthest_behind(ranks: Iterable[int], records: Mapping[int, RankRecord]) -> int:
    """Of ``ranks``, the one that the others wait for: least progress by (step, collective), then outside of a
    collective rather than inside (who is inside waits for somebody), then longest silent."""

    def progress(rank: int) -> tuple[int, int, bool, float]:
        record = records[rank]
        return record.step, record.collective, record.inside, record.heard_at

    return min(ranks, key=progress)
