"""The engine's status, gathered from its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from drumline.protocol.status import (
    CoordinatorStatus,
    EngineStatus,
    RankStatus,
    RequestCounts,
    SupervisorStatus,
)

if TYPE_CHECKING:
    from drumline.engine.coordinator import Coordinator


def engine_status(engine: Coordinator, late_replies: int, now: float) -> EngineStatus:
    """The state of ``engine`` at ``now``. Before it is ready there are ranks, but no groups and replicas."""
    core = engine.core
    balance = engine.coordination.balance
    replicas = tuple(core.replica_status()) if core is not None else ()
    return EngineStatus(
        state=engine.state.value,
        term=engine.term,
        supervisor=SupervisorStatus(engine.coordination.membership.supervisor_pid),
        coordinator=CoordinatorStatus(os.getpid(), engine.incarnation),
        groups=tuple(core.group_status()) if core is not None else (),
        replicas=replicas,
        ranks=_ranks(engine, now),
        requests=core.request_counts() if core is not None else RequestCounts(),
        counters=_counters(engine, late_replies),
        journal=engine.keeping.state,
        kv_blocks=min((replica.blocks_total for replica in replicas), default=0),
        faults=engine.coordination.faults.status(now, time.time()),
        waiting_for=engine.coordination.membership.waiting_for,
        eplb=balance.status() if balance is not None else None,
    )


def _ranks(engine: Coordinator, now: float) -> tuple[RankStatus, ...]:
    layout = engine.resolved.layout
    ranks: list[RankStatus] = []
    for rank, record in sorted(engine.coordination.membership.ranks.items()):
        place = layout.coordinates(rank)
        ranks.append(
            RankStatus(
                rank=rank,
                dp_rank=place.dp_rank,
                pp_rank=place.pp_rank,
                tp_rank=place.tp_rank,
                ep_rank=layout.ep_rank(rank),
                pid=record.pid,
                incarnation=record.incarnation,
                host=record.host,
                state=record.state.value,
                step=max(record.step, record.replied),
                step_age_s=engine.coordination.clocks[record.group].age(rank, now),
                restarts=record.restarts,
                last_fault=record.last_fault,
                kv_blocks=record.loaded.num_blocks if record.loaded is not None else 0,
                weight_bytes=record.loaded.weight_bytes if record.loaded is not None else 0,
            )
        )
    return tuple(ranks)


def _counters(engine: Coordinator, late_replies: int) -> dict[str, int]:
    """Every count there is, sockets and refusals under the name of their side."""
    counters: dict[str, int] = dict(engine.core.counters()) if engine.core is not None else {}
    clients, workers = engine.clients, engine.workers
    counters.update(_prefixed("client_frames_", msgspec.structs.asdict(clients.router.statistics())))
    counters.update(_prefixed("worker_frames_", msgspec.structs.asdict(workers.router.statistics())))
    counters.update(_prefixed("worker_messages_", engine.coordination.membership.refusals.as_dict()))
    counters.update(clients.connections.counts.as_dict())
    counters["clients"] = len(clients.connections)
    counters["client_messages_unknown_peer"] = clients.unknown_peers
    counters["client_hellos_refused"] = clients.refused_hellos
    counters["late_call_replies"] = late_replies
    counters.update(_prefixed("faults_", engine.coordination.faults.counts))
    if workers.faults is not None:
        counters.update(_prefixed("messages_", workers.faults.counts))
    counters.update(_prefixed("journal_", engine.keeping.counters()))
    return counters


def _prefixed(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {prefix + name: value for name, value in counts.items()}
