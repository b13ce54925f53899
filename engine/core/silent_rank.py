"""The rank that all others wait for, when all that is known of a loss is that they waited; no I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from drumline.engine.core.evidence import Complaints
from drumline.engine.core.liveness import furthest_behind
from drumline.engine.core.members import RankRecord
from drumline.protocol.errors import ErrorInfo


def blame_silent_rank(complaints: Complaints, records: Mapping[int, RankRecord]) -> ErrorInfo:
    """The first complaint, laid at the rank that computed and is not among those that complained: who is stopped or
    stuck says nothing, and its peers, whom it keeps waiting, are not to blame. Of several silent ones it is the one
    that was furthest behind. While an epoch formed a complaint stands as it is: the store's host may be what a rank
    cannot reach."""
    first, error = next(iter(complaints.errors.items()))
    silent = [rank for rank in complaints.places if rank not in complaints.errors]
    if not silent:
        return error
    record = records[furthest_behind(silent, complaints.places)]
    text = (
        f"rank {record.rank} (pid {record.pid}) says nothing while others wait for it; rank {first} reports: "
        f"{error.text}"
    )
    return msgspec.structs.replace(error, text=text, rank=record.rank, incarnation=record.incarnation)
