"""When an engine has come to rest, and what must hold then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drumline.engine.core.members import GroupStage, RankState
from tests.simulation.invariants import check_at_rest
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster


class Rest:
    """Looks at the whole engine from outside."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def whole(self) -> bool:
        """Whether every rank computes again, except those that end again and again."""
        host = self.cluster.hub.host
        if host is None or host.core is None or not host.core.idle:
            return False
        membership = host.coordination.membership
        if any(group.stage is not GroupStage.OPEN for group in membership.groups) or host.planner.unanswered:
            return False
        return self.cluster.crash_loop or all(record.state is RankState.READY for record in membership.ranks.values())

    @property
    def remembered(self) -> bool:
        """Whether requests that have ended are still kept for somebody."""
        host = self.cluster.hub.host
        kept = bool(self.cluster.disk.requests)
        return kept or (host is not None and host.core is not None and bool(host.core._book.register.by_id))

    @property
    def zombies(self) -> list[str]:
        """Processes whose place is taken and that have not been killed or fenced yet."""
        host = self.cluster.hub.host
        if host is None:
            return []
        ranks = host.coordination.membership.ranks
        processes = self.cluster.supervisor.processes.values()
        return [str(one) for one in processes if ranks[one.rank].incarnation != one.incarnation]

    def standing(self) -> str:
        """Where everything stands, for a failure's text."""
        host = self.cluster.hub.host
        if host is None:
            return "no coordinator"
        membership = host.coordination.membership
        ranks = {rank: str(record.state) for rank, record in membership.ranks.items()}
        groups = [(group.stage.name, group.epoch) for group in membership.groups]
        core = host.core
        replicas = core.replica_status() if core is not None else ()
        load = [(one.running, one.waiting) for one in replicas]
        balance = host.coordination.balance
        if balance is not None:
            groups.append((f"eplb {balance.status().state}, unanswered {host.planner.unanswered}", 0))
        return f"ranks {ranks}, groups {groups}, (running, waiting) {load}"

    def check(self) -> None:
        """Nothing is left over: no row, no block, no request, no step, no fault that was never recovered from."""
        host = self.cluster.hub.host
        if host is None or host.core is None:
            raise RuleBrokenError("no engine at the end of the day")
        core = host.core
        check_at_rest(core)
        self.cluster.rules.experts_at_rest(host)
        if core._book.register.by_id:
            raise RuleBrokenError(f"requests {list(core._book.register.by_id)} are remembered for ever")
        if self.cluster.disk.requests:
            raise RuleBrokenError(f"requests {list(self.cluster.disk.requests)} stay in the journal for ever")
        counters = host.keeping.counters()
        if counters["batches_queued"] != counters["batches_committed"]:
            raise RuleBrokenError(f"deliveries wait for ever: {counters}")
        if self.zombies and not self.cluster.crash_loop:
            raise RuleBrokenError(f"{self.zombies} live and their places are taken")
