"""Which rank a start waits for, and what that rank was doing; no I/O."""

from __future__ import annotations

from collections.abc import Mapping

from drumline.engine.core.members import MembershipConfig, RankRecord, RankState


def starting(ranks: Mapping[int, RankRecord]) -> list[RankRecord]:
    """The ranks of which a process has been started, or is awaited, and has not loaded."""
    return [record for record in ranks.values() if record.state is RankState.STARTING]


def start_due_at(config: MembershipConfig, ranks: Mapping[int, RankRecord]) -> float | None:
    """When the first of the starting ranks has made no progress for too long, None without one."""
    newest = max(record.progress_at for record in ranks.values())
    moments = [_since(config, record, newest) + config.start_deadline_s for record in starting(ranks)]
    return min(moments, default=None)


def overdue_rank(config: MembershipConfig, ranks: Mapping[int, RankRecord], now: float) -> RankRecord | None:
    """Of the starting ranks without progress for ``start_deadline_s``, the one that has come least far. None while
    there is no such rank."""
    newest = max(record.progress_at for record in ranks.values())
    overdue: list[tuple[bool, bool, float, float, int]] = []
    for record in starting(ranks):
        if now >= _since(config, record, newest) + config.start_deadline_s:
            loaded = record.load_done / record.load_total if record.load_total else 0.0
            queued = _queued(config, record)
            overdue.append((record.peer is not None, queued, loaded, record.progress_at, record.rank))
    return ranks[min(overdue)[-1]] if overdue else None


def _since(config: MembershipConfig, record: RankRecord, newest: float) -> float:
    # Whoever waits for its turn to load is as far as those who load.
    return newest if _queued(config, record) else record.progress_at


def _queued(config: MembershipConfig, record: RankRecord) -> bool:
    """Whether the rank may be waiting for its turn to load: it has read nothing, and turns are taken."""
    turns = config.worker.max_parallel_loading_workers > 0
    return turns and record.peer is not None and record.load_total == 0


def waiting_for(config: MembershipConfig, record: RankRecord) -> str:
    """What ``record`` was doing, for the error that says that it made no progress."""
    if record.peer is None:
        if record.rank in config.external_ranks:
            return "in which nothing was heard of it: it is started by a job script, not by this engine"
        return "after it was spawned: it has not said Hello"
    return f"while it loaded, with {record.load_done} of {record.load_total} bytes of weights"
