"""Which rank an engine that does not get ready waits for, and what that rank was doing; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from drumline.engine.core.members import GroupRecord, GroupStage, MembershipConfig, RankRecord, RankState


def overdue_rank(
    config: MembershipConfig, groups: Sequence[GroupRecord], ranks: Mapping[int, RankRecord], now: float
) -> RankRecord | None:
    """Of the starting ranks without progress for ``start_deadline_s``, the one that has come least far: the others
    only wait for it. None while there is no such rank."""
    newest = max(record.progress_at for record in ranks.values())
    overdue: list[tuple[bool, bool, float, float, int]] = []
    for record in ranks.values():
        if record.state is not RankState.STARTING:
            continue
        queued = _queued(config, groups[record.group], record)
        # Whoever waits for its turn to load is as far as those who load.
        since = newest if queued else record.progress_at
        if now - since > config.start_deadline_s:
            loaded = record.load_done / record.load_total if record.load_total else 0.0
            overdue.append((record.peer is not None, queued, loaded, record.progress_at, record.rank))
    return ranks[min(overdue)[-1]] if overdue else None


def _queued(config: MembershipConfig, group: GroupRecord, record: RankRecord) -> bool:
    """Whether the rank may be waiting for its turn to load: it has read nothing, and turns are taken."""
    turns = config.worker.max_parallel_loading_workers > 0
    return turns and group.stage is GroupStage.FORMING and record.load_total == 0


def waiting_for(config: MembershipConfig, group: GroupRecord, record: RankRecord) -> str:
    """What ``record`` was doing, for the error that says that it made no progress."""
    if record.peer is None:
        if record.rank in config.external_ranks:
            return "in which nothing was heard of it: it is started by a job script, not by this engine"
        return "after it was spawned: it has not said Hello"
    if group.stage is GroupStage.GATHERING:
        return "while its group gathered"
    if group.stage is GroupStage.OPENING_STORE:
        return "while the epoch's store was opened"
    return f"while its epoch formed, with {record.load_done} of {record.load_total} bytes of weights loaded"
