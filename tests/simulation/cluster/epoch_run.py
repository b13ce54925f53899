"""One epoch of a lockstep group as its ranks live it: they meet, fetch experts, and compute steps together.

Only ranks that were told the same Configure of the same (term, epoch) can be in one; a collective takes all of them, so
that a rank that is gone, stopped or hung holds up the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from drumline.protocol.messages import Configure, StageExperts, Step, StepDone
from tests.simulation.cluster.expert_load import LoadReports
from tests.simulation.cluster.expert_slots import ExpertSlots
from tests.simulation.cluster.kv_worker import EpochWorker
from tests.simulation.cluster.rank import SimRank
from tests.simulation.cluster.request_faults import fails
from tests.simulation.cluster.shuffles import EpochShuffles
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster

NO_TOKENS = np.zeros(0, dtype=np.int32)


class EpochRun:
    """``inside``: the ranks that are in it, by global rank; ``lost``: whether one of them has gone, after which nothing
    more comes of it."""

    def __init__(self, cluster: Cluster, group: int, configure: Configure) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.group = group
        self.configure = configure
        self.inside: dict[int, SimRank] = {}
        self.formed = False
        self.lost = False
        self._forming = False
        self._running: Step | None = None
        self._steps: list[Step] = []
        self._busy: set[int] = set()
        self._waits_for_all = False
        shape = cluster.shape
        dp, rest = divmod(len(configure.members), shape.layout.world_size)
        if rest or dp < 1:
            raise RuleBrokenError(f"{len(configure.members)} members of engine replicas of {shape.layout.world_size}")
        self.layout = msgspec.structs.replace(shape.layout, data_parallel_size=dp)
        self.order = [member.rank for member in configure.members]
        self._check_members()
        self.experts: ExpertSlots | None = None
        if shape.num_experts and shape.layout.enable_expert_parallel:
            self.experts = ExpertSlots(configure, self.layout, shape.moe_layer_stage, shape.num_experts)
        elif len(configure.fetches):
            raise RuleBrokenError("experts are to be fetched where every rank has all")
        self.needed = set(self.order) | (self.experts.travellers() if self.experts is not None else set())
        self.workers: list[EpochWorker] = []
        # Where experts move and are counted; from the time on that the ranks have met.
        self.shuffles: EpochShuffles | None = None
        self._load: LoadReports | None = None

    def _check_members(self) -> None:
        """Whole engine replicas of this group, ascending."""
        layout = self.cluster.shape.layout
        size = layout.world_size
        for first in range(0, len(self.order), size):
            ranks = self.order[first : first + size]
            if ranks != list(layout.replica_ranks(ranks[0] // size)):
                raise RuleBrokenError(f"members {self.order} are not whole engine replicas")
        if self.order != sorted(self.order) or not set(self.order) <= set(self.cluster.shape.groups[self.group]):
            raise RuleBrokenError(f"members {self.order} of group {self.group}")

    # -------------------------------------------------------------------- to meet

    def enter(self, process: SimRank, configure: Configure) -> None:
        """A rank comes, told ``configure``."""
        ours = self.configure
        same = (configure.members, configure.parked, configure.store_host, configure.store_port) == (
            (ours.members, ours.parked, ours.store_host, ours.store_port)
        )
        arrays = ("placement", "slots", "fetches")
        if not same or any(not np.array_equal(getattr(ours, name), getattr(configure, name)) for name in arrays):
            raise RuleBrokenError(f"{process} is told other members or experts than those in its epoch: {configure}")
        listed = ours.members if configure.role == "compute" else ours.parked
        if not any((one.rank, one.incarnation) == (process.rank, process.incarnation) for one in listed):
            raise RuleBrokenError(f"{process} is configured as {configure.role} and not listed: {ours}")
        self.inside[process.rank] = process
        if process.rank not in self.needed:
            process.soon(0.005, partial(self._parked_ready, process))
        elif self.lost or self._some_dead():
            self._missed(process)
        elif self.needed <= self.inside.keys():
            self._forming = True
            self.clock.soon(0.01, self._form)

    def _parked_ready(self, process: SimRank) -> None:
        if process.run is self:
            process.ready()

    def _some_dead(self) -> bool:
        """Whether somebody who is needed has died before it came."""
        listed = [*self.configure.members, *self.configure.parked]
        incarnations = {one.rank: one.incarnation for one in listed if one.rank in self.needed}
        return any(not self.cluster.lives(rank, incarnation) for rank, incarnation in incarnations.items())

    def _form(self) -> None:
        if self.lost:
            return
        processes = [self.inside[rank] for rank in sorted(self.needed)]
        if any(process.hung for process in processes):
            return
        if any(process.stopped for process in processes):
            self._waits_for_all = True
            return
        if self.experts is not None:
            self.experts.carry_out(self.inside)
            self._balance(self.experts)
        self.formed = True
        self.needed = set(self.order)
        self._make_workers()
        for process in processes:
            process.soon(0.003, partial(self._ready, process))

    def _balance(self, experts: ExpertSlots) -> None:
        config = self.cluster.shape.balance
        if config is not None:
            self.shuffles = EpochShuffles(self.cluster, experts, config, self._is_free)
            self._load = LoadReports(experts, self.cluster.skew, config.load_interval)

    def _ready(self, process: SimRank) -> None:
        if process.run is self and not process.hung:
            process.ready()

    def _make_workers(self) -> None:
        """Each replica with the KV cache that its very processes hold."""
        cluster, term, epoch = self.cluster, self.configure.term, self.configure.epoch
        shape = cluster.shape
        for replica in range(self.layout.num_replicas):
            ranks = [self.order[place] for place in self.layout.ranks_of_replica(replica)]
            slots = cluster.kv_of(tuple(self.inside[rank].incarnation for rank in ranks))
            reporting = self.order[self.layout.reporting_rank(replica)]
            self.workers.append(EpochWorker(shape.core, reporting, replica, slots, term, epoch, shape.num_blocks))

    # -------------------------------------------------------------------- to be left

    def gone(self, process: SimRank, why: str) -> None:
        """A rank has left, failed or died: the others wait for it in vain, or find out."""
        self.inside.pop(process.rank, None)
        if process.rank not in self.needed:
            return
        if self._forming and not self.formed and self.experts is not None and why != "died":
            self.experts.carry_out_in_part(process.rank, process, self.clock.random)
        if not self.lost:
            self.lost = True
            if self._running is not None:
                self._running = None
                for worker, step in zip(self.workers, self._steps, strict=True):
                    worker.abandon(step, self.clock.random)
        for other in list(self.inside.values()):
            if other.rank in self.needed:
                self._missed(other)

    def _missed(self, process: SimRank) -> None:
        """``process`` misses somebody, and mostly finds out."""
        if self.clock.random.random() < 0.8:
            process.soon(0.02, partial(self._complain, process))

    def _complain(self, process: SimRank) -> None:
        if process.run is self and (not self.formed or process.inbox):
            process.fault("peer_lost", "connection closed by peer")

    def wake(self) -> None:
        """A rank that was stopped goes on."""
        if self._waits_for_all:
            self._waits_for_all = False
            if not self.formed:
                self._form()
            elif self._running is not None:
                self._finish()

    # -------------------------------------------------------------------- steps

    def _is_free(self, process: SimRank) -> bool:
        """Whether the main thread of ``process`` is in no step."""
        return self._running is None and process.rank not in self._busy

    def pick_up(self, process: SimRank) -> None:
        """The main thread of ``process`` does what it was told, in order, up to the step that all must come to."""
        while process.run is self and process.inbox and self._is_free(process) and not process.hung:
            head = process.inbox[0]
            if isinstance(head, Step):
                if process.begun < head.step:
                    process.begun = head.step
                    if self.shuffles is not None:
                        self.shuffles.begin(process, head)
                break
            process.inbox.popleft()
            if self.shuffles is not None:
                if isinstance(head, StageExperts):
                    self.shuffles.stage(process, head)
                else:
                    self.shuffles.cancel(process, head)
        self.try_start()

    def try_start(self) -> None:
        """A step begins when every member has it and none is in another."""
        if self.lost or self._running is not None or self._busy or not self.formed:
            return
        processes = [self.inside[rank] for rank in self.order]
        heads = [process.inbox[0] for process in processes if process.inbox]
        steps = [head for head in heads if isinstance(head, Step)]
        if len(steps) < len(processes) or any(process.begun < steps[0].step for process in processes):
            return
        self._start(processes, steps)

    def _start(self, processes: list[SimRank], heads: list[Step]) -> None:
        first = heads[0]
        for head in heads:
            if (head.step, head.wave, head.lane) != (first.step, first.wave, first.lane) or not np.array_equal(
                head.num_tokens_across_dp, first.num_tokens_across_dp
            ):
                raise RuleBrokenError(f"ranks of one epoch are sent different steps: {first} and {head}")
            if head.shuffle != first.shuffle:
                raise RuleBrokenError(f"ranks of one epoch are to move experts by {first.shuffle} and {head.shuffle}")
        if len(first.num_tokens_across_dp) != len(self.workers):
            raise RuleBrokenError(f"{first.num_tokens_across_dp} for {len(self.workers)} replicas")
        if not self._check_experts(first, processes):
            return
        self._running = first
        self._steps = [heads[self.layout.ranks_of_replica(replica)[0]] for replica in range(len(self.workers))]
        for process in processes:
            process.position = (first.step, 7, True)
        decodes = not any(len(head.prefill_rows) for head in heads)
        for process in processes:
            self.cluster.faults.in_step(process, first, "decode" if decodes else "prefill")
            if self.lost:
                return
        slowest = max(process.factor for process in processes)
        self.clock.soon(self.cluster.shape.step_s * slowest, partial(self._finish_of, first))

    def _check_experts(self, step: Step, processes: list[SimRank]) -> bool:
        """Count what the experts compute, and see that all ranks have the same. False when one found that it has
        missed a message, and left."""
        if self.shuffles is None or self._load is None:
            return True
        believed = self.cluster.rules.believed(step)
        before = self.shuffles.placement.copy()
        if not self.shuffles.check(step, processes, believed):
            return False
        truth = self._load.count(step, before, self.clock.now)
        if truth is not None:
            self.cluster.rules.reported(step, *truth)
        return True

    def _finish_of(self, step: Step) -> None:
        if self._running is step:
            self._finish()

    def _finish(self) -> None:
        """The last collective of the step: everybody must be there."""
        processes = [self.inside[rank] for rank in self.order if rank in self.inside]
        for process in processes:
            if process.hung or process.stopped:
                process.position = (process.position[0], 3, False)
        if any(process.hung for process in processes):
            return
        if any(process.stopped for process in processes):
            self._waits_for_all = True
            return
        if self._fails(processes):
            return
        self._running = None
        for process in processes:
            process.inbox.popleft()
        self._execute(processes)

    def _execute(self, processes: list[SimRank]) -> None:
        for replica, worker in enumerate(self.workers):
            places = self.layout.ranks_of_replica(replica)
            done = worker.execute(self._steps[replica])
            self.clock.seen["replica_steps"] += 1
            acknowledged = msgspec.structs.replace(done, tokens=NO_TOKENS, logprob_index=NO_TOKENS, logprobs=())
            for place in places:
                process = processes[place]
                own = done if process.rank == worker.rank else msgspec.structs.replace(acknowledged, rank=process.rank)
                if self._load is not None:
                    own = self._load.report(place, own)
                self._busy.add(process.rank)
                process.soon(self.cluster.shape.step_s * 0.2, partial(self._done, process, own))

    def _done(self, process: SimRank, done: StepDone) -> None:
        process.step_done(self, done)
        self._busy.discard(process.rank)
        if self.shuffles is not None and process.run is self:
            self.shuffles.answered(process, done.step)
            self.shuffles.poll(process)
        self.pick_up(process)

    def _fails(self, processes: list[SimRank]) -> bool:
        for replica, worker in enumerate(self.workers):
            computing = [processes[place] for place in self.layout.ranks_of_replica(replica)]
            if fails(self.cluster, worker, self._steps[replica], computing, self.inside.get(worker.rank)):
                return True
        return False
