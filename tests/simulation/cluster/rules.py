"""What must hold at every moment, and what must be at the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from drumline.engine.core.balance.window import Snapshot
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.members import Ended, ToPeer
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Configure, I32Matrix, Leave, Step, ToClient
from tests.simulation.cluster.delivery_rules import DeliveryRules
from tests.simulation.cluster.expert_load import I64
from tests.simulation.cluster.rest import Rest
from tests.simulation.cluster.step_rules import ClusterStepRules
from tests.simulation.cluster.streams import Asked
from tests.simulation.invariants import check_blocks, check_prefix_cache, check_rows, groups_of
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.host import Host

StepKey = tuple[int, int, int]
"""Term, epoch, step."""
RESTART_WINDOW_S = 600.0
SUSPICIOUS = 3
"""So many faults that look like a request's doing may be laid at one that had no part in them."""


class Rules:
    """All rules that need to see more than one part."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.rest = Rest(cluster)
        self.steps: ClusterStepRules | None = None
        self.delivery = DeliveryRules()
        self._epochs: dict[int, tuple[int, int]] = {}
        self._hits: dict[int, int] = {}
        self._sent = 0
        self._placements: dict[StepKey, I32Matrix] = {}
        self._loads: dict[StepKey, tuple[I64, int]] = {}

    # -------------------------------------------------------------------- ranks

    def started(self, rank: int, starts: Sequence[float]) -> None:
        """No rank is started again more often than the limit says."""
        host = self.cluster.hub.host
        since = max(self.clock.now - RESTART_WINDOW_S, self.cluster.term_since)
        recent = [moment for moment in starts if moment >= since]
        limit = self.cluster.shape.restart_limit + 1
        if host is not None and len(recent) > limit:
            raise RuleBrokenError(f"rank {rank} is started {len(recent)} times within 10 minutes, limit {limit}")

    def sent(self, host: Host, outputs: Sequence[Any]) -> None:
        """What the decisions have the coordinator send: epochs only grow."""
        for output in outputs:
            if isinstance(output, ToPeer) and isinstance(output.message, Leave | Configure):
                group = host.coordination.membership.ranks[output.rank].group
                at = (output.message.term, output.message.epoch)
                if at < self._epochs.get(group, (0, 0)):
                    raise RuleBrokenError(f"group {group}: {output.message} after {self._epochs[group]}")
                if at > self._epochs.get(group, (0, 0)) and isinstance(output.message, Leave):
                    self.clock.seen["epochs"] += 1
                    self.clock.note(f"group {group} regroups as {at}")
                self._epochs[group] = at
        self.core_holds(host)

    def note_waves(self) -> None:
        """Waves end when nothing is unfinished."""
        if self.steps is not None:
            self.steps.note_finished_waves()

    def core_holds(self, host: Host) -> None:
        """Blocks, rows and the prefix cache of the core are whole."""
        core = host.core
        if core is None:
            return
        self._sent += 1
        if self._sent % 3:
            return
        for group in groups_of(core):
            check_blocks(group)
            check_rows(group)
            if self._sent % 30 == 0:
                check_prefix_cache(group)

    def watch(self, host: Host, core: EngineCore) -> None:
        """From its first step on, look at what the core plans."""
        if self.steps is None:
            self.steps = ClusterStepRules(core, self.cluster.shape.core, partial(self._planned, host))

    def coordinator_died(self, host: Host) -> None:
        """Its core is gone with it."""
        self.steps = None
        self.delivery = DeliveryRules()

    # -------------------------------------------------------------------- experts

    def _planned(self, host: Host, step: Step) -> None:
        balance = host.coordination.balance
        if balance is not None:
            self._placements[step.term, step.epoch, step.step] = balance.placement

    def believed(self, step: Step) -> I32Matrix:
        """The placement that the coordinator took for the one of ``step`` when it planned it."""
        return self._placements.pop((step.term, step.epoch, step.step))

    def reported(self, step: Step, tokens: I64, steps: int) -> None:
        """The answers to ``step`` report so many tokens, int64 (layers, experts)."""
        self._loads[step.term, step.epoch, step.step] = tokens, steps

    def counted(self, host: Host, step: int, snapshot: Snapshot) -> None:
        """What the coordinator takes the reports for: each expert's own tokens, whatever was moved meanwhile."""
        membership = host.coordination.membership
        key = (host.term, membership.groups[0].epoch, step)
        tokens, steps = self._loads.pop(key)
        self.clock.seen["load_reports"] += 1
        if snapshot.steps != steps or not np.array_equal(snapshot.tokens, tokens):
            text = f"the load of step {step} is taken for {snapshot.tokens.tolist()} of {snapshot.steps} steps"
            raise RuleBrokenError(f"{text}, and was {tokens.tolist()} of {steps}")

    def experts_at_rest(self, host: Host) -> None:
        """Every report has been counted, and the coordinator knows what ranks hold."""
        balance, membership = host.coordination.balance, host.coordination.membership
        if balance is None:
            return
        present = (host.term, membership.groups[0].epoch)
        if forgotten := [key for key in self._loads if key[:2] == present]:
            raise RuleBrokenError(f"the expert loads of (term, epoch, step) {forgotten} were never counted")
        status, load = balance.status(), balance.expert_load(7)
        if status.state not in ("idle", "planning", "moving") or load.placement.shape != balance.placement.shape:
            raise RuleBrokenError(f"the balance of experts is told as {status} and {load}")
        for process in self.cluster.supervisor.processes.values():
            shuffles = process.run.shuffles if process.run is not None else None
            if shuffles is not None and not np.array_equal(shuffles.placement, balance.placement):
                text = f"ranks hold {shuffles.placement.tolist()} at the end"
                raise RuleBrokenError(f"{text}, the coordinator believes {balance.placement.tolist()}")

    # -------------------------------------------------------------------- delivery

    def delivered(self, host: Host, identity: bytes, message: ToClient) -> None:
        """Nothing about requests leaves before it is on disk."""
        disk = self.cluster.disk
        kept = self.cluster.shape.keeps_journal and host.keeping.state != "degraded" and disk.whole
        self.delivery.check(disk if kept else None, identity, message)

    # -------------------------------------------------------------------- requests

    def accepted(self, asked: Asked) -> None:
        """A request is taken in: from here on it may not be lost."""
        self.clock.seen["accepted"] += 1
        wanted = asked.wanted
        if wanted.poison:
            self.cluster.faults.poison.add(asked.seed)
        if wanted.not_finite:
            self.cluster.faults.not_finite.add(asked.seed)

    def hit(self, seeds: Sequence[int]) -> None:
        """The logits of the requests with these seeds were not finite."""
        for seed in seeds:
            self._hits[seed] = self._hits.get(seed, 0) + 1

    def request_failed(self, asked: Asked, error: ErrorInfo) -> None:
        """Only a request that is itself to blame may fail."""
        self.clock.note(f"{asked.request_id} fails: {error.kind}: {error.text}")
        self.clock.seen["failed_" + error.kind] += 1
        if error.kind == "poisoned" and (asked.wanted.poison or self._unlucky):
            return
        if error.kind == "numeric" and self._hits.get(asked.seed, 0) >= 2:
            return
        if self.cluster.engine_ended:
            return
        raise RuleBrokenError(f"request {asked.request_id} failed: {error.kind}: {error.text}")

    @property
    def _unlucky(self) -> bool:
        """Whether injected faults may have been laid at a request."""
        injected = self.cluster.faults.from_inside
        return injected > 0 and injected + self.clock.seen["poison_deaths"] >= SUSPICIOUS

    def resume_rejected(self, asked: Asked, error: ErrorInfo) -> None:
        """A request that was taken in and has not ended for its client can be resumed."""
        if error.kind in ("poisoned", "numeric"):
            asked.failed = error
            self.request_failed(asked, error)
            return
        faults = self.cluster.faults
        if asked.seed in faults.poison or self._hits.get(asked.seed, 0) >= 2 or self._unlucky:
            # It has failed, and the coordinator that could have said why is gone.
            asked.lost = True
            return
        if asked.forgot and (not self.cluster.disk.whole or self.cluster.was_degraded):
            asked.lost = True
            return
        if not self.cluster.shape.keeps_journal and asked.forgot and self.cluster.term > 1:
            asked.lost = True
            return
        raise RuleBrokenError(f"request {asked.request_id} cannot be resumed: {error.kind}: {error.text}")

    def engine_ended(self, host: Host, ended: Ended) -> None:
        """Only ranks that end again and again may end the engine, and one that cannot load or meet the others at the
        very first start."""
        self.clock.seen["engine_ended"] += 1
        error = ended.error
        took_over = host.coordination.membership.took_over
        first_start = not took_over and host.core is None and self.cluster.faults.caused > 0
        if first_start and error is not None and error.kind == "start_failed":
            return
        if not self.cluster.may_end:
            raise RuleBrokenError(f"the engine ended: {ended.reason} {ended.error}")
