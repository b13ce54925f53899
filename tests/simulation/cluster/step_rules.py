"""What every planned step must look like in an engine whose replicas come and go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drumline.engine.core.batch_table import DECODE, PREFILL
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.wave import WaveState
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Step
from tests.simulation.invariants import groups_of
from tests.simulation.worker import RuleBrokenError


class ClusterStepRules:
    """Watches the steps of all groups of one core: lockstep, steps in flight, waves, lanes, order. ``see`` is shown one
    of each."""

    def __init__(self, core: EngineCore, config: CoreConfig, see: Callable[[Step], None]) -> None:
        self._core = core
        self._see = see
        self._plan, self._fail = core.plan, core.fail
        core.plan, core.fail = self.plan, self.fail  # type: ignore[method-assign]  # all of them come through here
        self._groups = groups_of(core)
        self._per_group = config.replicas_per_group
        self._config = config
        self._limit = config.steps_in_flight
        self._last_lane = [config.pipeline_parallel_size - 1] * len(self._groups)
        self._next_wave = [0] * len(self._groups)
        self._stepped = [False] * len(self._groups)
        self._demanded = [False] * len(self._groups)
        self._last = [(-1, -1)] * len(self._groups)

    def note_finished_waves(self) -> None:
        """A group that has computed something and has nothing unfinished will compute in its next wave. A wave is
        paused only when nothing is unfinished and nothing in flight."""
        self._core.group_status()  # books the answers that have come
        for index, group in enumerate(self._groups):
            if self._stepped[index] and group.unfinished == 0:
                self._stepped[index] = False
                self._next_wave[index] += 1
            if group.wave.state is WaveState.PAUSED and group.in_flight:
                raise RuleBrokenError(f"group {index}: wave {group.wave.number} is paused with steps in flight")

    def fail(self, request_id: str, error: ErrorInfo) -> None:
        """A request fails. Others that were kept waiting for that may come at once, in the next wave."""
        self._fail(request_id, error)
        self.note_finished_waves()

    def plan(self, now: float) -> list[tuple[int, Step]]:
        """What the core plans, looked at before anything else happens."""
        if any(group.carrier is not None and group.carrier.demands for group in self._groups):
            self.note_finished_waves()
        planned = self._plan(now)
        if planned:
            self._see(planned[0][1])
            self._check(planned)
        return planned

    def _check(self, planned: list[tuple[int, Step]]) -> None:
        first = planned[0][1]
        index = planned[0][0] // self._per_group
        group = self._groups[index]
        wanted = [replica for replica in sorted(self._core.serving) if replica // self._per_group == index]
        if [replica for replica, _ in planned] != wanted:
            raise RuleBrokenError(f"step {first.step} goes to {[replica for replica, _ in planned]}, not to {wanted}")
        for _, step in planned:
            if (step.step, step.epoch, step.wave, step.lane) != (first.step, first.epoch, first.wave, first.lane):
                raise RuleBrokenError(f"replicas of one group get different steps: {first} and {step}")
            if step.num_tokens_across_dp.tolist() != first.num_tokens_across_dp.tolist():
                raise RuleBrokenError("replicas are told different token counts")
            if step.shuffle != first.shuffle:
                raise RuleBrokenError(f"replicas are to move experts by {first.shuffle} and {step.shuffle}")
            # The first step of an epoch restates the rows of all lanes.
            if step.step and any(admit.lane != step.lane for admit in step.admitted):
                raise RuleBrokenError(f"a row of another lane is admitted in a step of lane {step.lane}")
        idle = not first.num_tokens_across_dp.any() and first.shuffle is None
        if len(first.num_tokens_across_dp) != len(wanted) or idle:
            raise RuleBrokenError(f"step {first.step} computes {first.num_tokens_across_dp.tolist()}")
        if sum(1 for record in group.in_flight if record.missing) > self._limit:
            raise RuleBrokenError(f"{len(group.in_flight)} steps in flight")
        self._check_order(index, first)
        # What is made for what it carries alone takes no turn.
        if first.num_tokens_across_dp.any():
            self._check_turn(index, first.lane)

    def _check_order(self, index: int, step: Step) -> None:
        last_epoch, last_step = self._last[index]
        if step.epoch < last_epoch or step.step != (last_step + 1 if step.epoch == last_epoch else 0):
            raise RuleBrokenError(f"group {index}: step {step.step} of epoch {step.epoch} after {self._last[index]}")
        self._last[index] = (step.epoch, step.step)
        if self._demanded[index] and step.wave == self._next_wave[index] - 1:
            # Work that comes while steps run for what they carry alone may join their wave.
            self._next_wave[index] -= 1
        self._demanded[index] = self._groups[index].unfinished == 0
        if step.wave != self._next_wave[index]:
            raise RuleBrokenError(f"group {index}: a step of wave {step.wave}, expected {self._next_wave[index]}")
        self._stepped[index] = True

    def _check_turn(self, index: int, lane: int) -> None:
        """Lanes take turns; those between the last one and this have no row that could compute."""
        table, lanes = self._groups[index].table, self._config.pipeline_parallel_size
        passed = (self._last_lane[index] + 1) % lanes
        while passed != lane:
            computing = ((table.status == DECODE) | (table.status == PREFILL)) & (table.lane == passed)
            if computing.any():
                raise RuleBrokenError(f"lane {passed} is passed over with rows {np.flatnonzero(computing).tolist()}")
            passed = (passed + 1) % lanes
        self._last_lane[index] = lane
