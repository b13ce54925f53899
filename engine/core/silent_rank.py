"""The rank that all others wait for, when all that is known of a loss is that they waited; no I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from drumline.engine.core.evidence import Loss
from drumline.engine.core.liveness import furthest_behind
from drumline.engine.core.members import GroupRecord, GroupStage, RankRecord


def blame_silent_rank(
    loss: Loss, complainers: frozenset[int], group: GroupRecord, records: Mapping[int, RankRecord]
) -> Loss:
    """``loss``, or that of the rank of the open ``group`` that is not among the ``complainers``, the ranks that only
    miss another: who is stopped or stuck says nothing, and its peers, whom it keeps waiting, are not to blame. Of
    several silent ones it is the one that is furthest behind. While an epoch forms a complaint stands as it is: the
    store's host may be what a rank cannot reach."""
    silent = [rank for rank in group.ranks if rank not in complainers]
    if not complainers or not silent or group.stage is not GroupStage.OPEN:
        return loss
    record = records[furthest_behind(silent, records)]
    text = (
        f"rank {record.rank} (pid {record.pid}) says nothing while others wait for it; rank {loss.rank} reports: "
        f"{loss.error.text}"
    )
    error = msgspec.structs.replace(loss.error, text=text, rank=record.rank, incarnation=record.incarnation)
    return Loss(record.rank, error)
