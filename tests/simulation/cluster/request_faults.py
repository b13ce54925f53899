"""What requests do to the ranks that compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drumline.protocol.messages import Step
from tests.simulation.cluster.kv_worker import EpochWorker
from tests.simulation.cluster.process import SIGSEGV
from tests.simulation.cluster.rank import SimRank

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster


def fails(
    cluster: Cluster, worker: EpochWorker, step: Step, computing: Sequence[SimRank], reporting: SimRank | None
) -> bool:
    """Whether a request of ``worker``, which the ranks ``computing`` are, kills some of them in ``step``, or has logits
    that are not finite."""
    faults, clock = cluster.faults, cluster.clock
    requests = worker.computing(step)
    if any(seed in faults.poison for _, seed in requests):
        clock.note(f"step {step.step}: a poisoned request kills {[str(victim) for victim in computing]}")
        clock.seen["poison_deaths"] += 1
        for victim in computing[:1] if clock.random.random() < 0.5 else computing:
            victim.end(signal=SIGSEGV)
        return True
    if reporting is None:
        return False
    rows = tuple(row for row, seed in requests if seed in faults.not_finite)
    if not rows and faults.next_not_finite(reporting, requests):
        rows = (requests[0][0],)
    if rows:
        cluster.hit([seed for row, seed in requests if row in rows])
        reporting.fault("numeric", f"rows {rows} are not finite", rows)
    return bool(rows)
