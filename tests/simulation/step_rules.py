"""What every planned step must look like, whatever is in it."""

from __future__ import annotations

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.wave import WaveState
from drumline.protocol.messages import Step
from tests.simulation.invariants import groups_of
from tests.simulation.worker import RuleBrokenError


class StepRules:
    """Watches the steps of all groups: lockstep, steps in flight, waves."""

    def __init__(self, core: EngineCore, config: CoreConfig) -> None:
        self._core = core
        self._groups = groups_of(core)
        self._per_group = self._groups[0].replicas
        self._limit = 2 if config.async_scheduling else 1
        self._next_wave = [0] * len(self._groups)
        self._stepped = [False] * len(self._groups)

    def note_finished_waves(self) -> None:
        """A group that has computed something and has nothing unfinished will compute in its next wave."""
        self._core.group_status()  # books the answers that have come
        for index, group in enumerate(self._groups):
            if self._stepped[index] and group.unfinished == 0:
                self._stepped[index] = False
                self._next_wave[index] += 1

    def check(self, planned: list[tuple[int, Step]]) -> None:
        group = planned[0][0] // self._per_group
        first = planned[0][1]
        wanted = list(range(group * self._per_group, (group + 1) * self._per_group))
        if [replica for replica, _ in planned] != wanted:
            raise RuleBrokenError(f"step {first.step} goes to {[replica for replica, _ in planned]}, not to {wanted}")
        for _, step in planned:
            if (step.step, step.epoch, step.wave) != (first.step, first.epoch, first.wave):
                raise RuleBrokenError(f"replicas of one group get different steps: {first} and {step}")
            if step.num_tokens_across_dp.tolist() != first.num_tokens_across_dp.tolist():
                raise RuleBrokenError("replicas are told different token counts")
        if not first.num_tokens_across_dp.any():
            raise RuleBrokenError(f"step {first.step} computes nothing anywhere")
        if len(self._groups[group].in_flight) > self._limit:
            raise RuleBrokenError(f"{len(self._groups[group].in_flight)} steps in flight")
        if first.wave != self._next_wave[group] or self._groups[group].wave.state is not WaveState.RUNNING:
            raise RuleBrokenError(f"a step of wave {first.wave}, expected one of {self._next_wave[group]}")
        self._stepped[group] = True
