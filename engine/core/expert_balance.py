"""The balancer among its neighbours: what membership knows of ranks comes in, what it says goes to them; no I/O."""

from __future__ import annotations

from drumline.engine.core.balance.balancer import Balancer
from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.balance.places import ExpertPlaces, number_hosts
from drumline.engine.core.balance.plan import PlacementPlan
from drumline.engine.core.balance.shuffle import ToRank
from drumline.engine.core.balance.turns import Late
from drumline.engine.core.decisions import EpochReady, Output, Rebalanced, Tell, ToPeer
from drumline.engine.core.members import MembershipConfig
from drumline.engine.core.membership import Membership
from drumline.engine.core.refit import ranks_of_stage
from drumline.protocol.messages import Event, ExpertLoad, I32Matrix, Staged, StepDone
from drumline.protocol.status import EplbStatus


class ExpertBalance:
    """The balance of the experts of one engine, whose ranks are all in one lockstep group."""

    def __init__(self, config: BalanceConfig, members: MembershipConfig, membership: Membership) -> None:
        self.balancer = Balancer(config, members.num_experts, members.term)
        self._config = members
        self._membership = membership

    @property
    def placement(self) -> I32Matrix:
        """int32 (moe_layers, slots), the one in force."""
        return self.balancer.placement

    def opened(self, ready: EpochReady, now: float) -> None:
        """An epoch has opened."""
        group = self._membership.groups[ready.group]
        if group.refit is None:
            return
        stages = ranks_of_stage(self._config.layout, group.members)
        records = self._membership.ranks
        # Ranks of one place in other stages are on other hosts at most where the first one's is too.
        places = ExpertPlaces(
            stages=tuple(tuple(stage) for stage in stages),
            slots=group.refit.slots,
            nodes=number_hosts([records[rank].host for rank in stages[0]]),
            layer_stage=self._config.moe_layer_stage,
        )
        members = frozenset(records[rank].incarnation for rank in group.members)
        self.balancer.opened(ready.epoch, places, group.refit.placement, members, now)

    def closed(self, now: float) -> None:
        """The epoch is over."""
        self.balancer.closed("a rank was lost, or the ranks came together anew", now)

    def step_done(self, rank: int, done: StepDone, now: float) -> None:
        """A rank has answered a step. Raises ValueError for an expert load that does not fit."""
        self.balancer.step_done(rank, done, now)

    def staged(self, message: Staged, now: float) -> None:
        """A rank of the present epoch has all that it gets, or has dropped it."""
        if not self.balancer.staged(message, now):
            self._membership.refusals.out_of_order += 1

    def planned(self, plan: PlacementPlan, now: float) -> None:
        """A plan that was asked for."""
        self.balancer.planned(plan, now)

    def rebalance(self, caller: int, placement: I32Matrix | None, now: float) -> None:
        """See :meth:`Balancer.rebalance`."""
        self.balancer.rebalance(caller, placement, now)

    @property
    def due_at(self) -> float | None:
        """When :meth:`tick` wants to be called."""
        return self.balancer.due_at

    def tick(self, now: float) -> Late | None:
        """See :meth:`Balancer.tick`."""
        return self.balancer.tick(now)

    def status(self) -> EplbStatus:
        """As the engine's status shows it."""
        return self.balancer.status()

    def expert_load(self, call_id: int) -> ExpertLoad:
        """The answer to ExpertLoadQuery."""
        return self.balancer.expert_load(call_id)

    def take(self) -> list[Output]:
        """What is to be sent and told, in order."""
        outputs: list[Output] = []
        for output in self.balancer.take():
            if isinstance(output, ToRank):
                peer = self._membership.ranks[output.rank].peer
                if peer is not None:
                    outputs.append(ToPeer(output.rank, peer, output.message))
                continue
            outputs.append(output)
            if isinstance(output, Rebalanced):
                report = output.report
                text = f"experts {report.outcome}: {report.reason}"
                outputs.append(Tell(Event("rebalance", text, done=report.slots_moved, seconds=report.seconds)))
        return outputs
