"""What every planned step must look like, whatever is in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drumline.engine.core.batch_table import DECODE, PREFILL
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.wave import WaveState
from drumline.protocol.messages import Step
from tests.simulation.invariants import groups_of
from tests.simulation.worker import RuleBrokenError


class StepRules:
    """Watches the steps of all groups: lockstep, steps in flight, waves, lanes, what gathering costs. ``serving``: the
    replicas that serve now, by group."""

    def __init__(self, core: EngineCore, config: CoreConfig, serving: Sequence[Sequence[int]]) -> None:
        self._serving = serving
        self._core = core
        self._groups = groups_of(core)
        self._per_group = self._groups[0].replicas
        self._config = config
        self._limit = config.pipeline_parallel_size + (1 if config.async_scheduling else 0)
        self._last_lane = [config.pipeline_parallel_size - 1] * len(self._groups)
        self._gathered = [0, 0, 0, 0]
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
        wanted = list(self._serving[group])
        if [replica for replica, _ in planned] != wanted:
            raise RuleBrokenError(f"step {first.step} goes to {[replica for replica, _ in planned]}, not to {wanted}")
        for _, step in planned:
            if (step.step, step.epoch, step.wave, step.lane) != (first.step, first.epoch, first.wave, first.lane):
                raise RuleBrokenError(f"replicas of one group get different steps: {first} and {step}")
            if len(step.num_tokens_across_dp) != len(wanted):
                raise RuleBrokenError(f"{len(step.num_tokens_across_dp)} token counts for {len(wanted)} replicas")
            if step.num_tokens_across_dp.tolist() != first.num_tokens_across_dp.tolist():
                raise RuleBrokenError("replicas are told different token counts")
            if step.step > 0 and any(admit.lane != step.lane for admit in step.admitted):
                raise RuleBrokenError(f"a row of another lane is admitted in a step of lane {step.lane}")
        if not first.num_tokens_across_dp.any():
            raise RuleBrokenError(f"step {first.step} computes nothing anywhere")
        if len(self._groups[group].in_flight) > self._limit:
            raise RuleBrokenError(f"{len(self._groups[group].in_flight)} steps in flight")
        if first.wave != self._next_wave[group] or self._groups[group].wave.state is not WaveState.RUNNING:
            raise RuleBrokenError(f"a step of wave {first.wave}, expected one of {self._next_wave[group]}")
        self._stepped[group] = True
        self._check_turn(group, first.lane)
        if self._config.attention_data_parallel_size > 1:
            self._gather(first.num_tokens_across_dp.tolist())

    def _check_turn(self, group: int, lane: int) -> None:
        """Lanes take turns; those between the last one and this have no row that could compute."""
        table, lanes = self._groups[group].table, self._config.pipeline_parallel_size
        passed = (self._last_lane[group] + 1) % lanes
        while passed != lane:
            computing = ((table.status == DECODE) | (table.status == PREFILL)) & (table.lane == passed)
            if computing.any():
                raise RuleBrokenError(f"lane {passed} is passed over with rows {np.flatnonzero(computing).tolist()}")
            passed = (passed + 1) % lanes
        self._last_lane[group] = lane

    def _gather(self, tokens: list[int]) -> None:
        attn_dp, ranks = self._config.attention_data_parallel_size, self._config.attention_tensor_parallel_size
        for first in range(0, len(tokens), attn_dp):
            own = tokens[first : first + attn_dp]
            shares = [(count + part) // ranks for count in own for part in range(ranks)]
            area = max(shares) * len(shares)
            padded = area <= 2 * sum(own)
            waste = area - sum(own) if padded else 0
            packed = not padded and area != sum(own)
            self._gathered = [
                had + more for had, more in zip(self._gathered, (sum(own), waste, waste > 0, packed), strict=True)
            ]

    def check_gather_counts(self) -> None:
        """The core has counted what gathering costs as the rule for padding says."""
        names = ("attn_dp_tokens", "attn_dp_padding_rows", "attn_dp_padded_steps", "attn_dp_packed_steps")
        counters = self._core.counters()
        counted = [counters.get(name, 0) for name in names]
        if counted != self._gathered:
            raise RuleBrokenError(f"{names} are {counted}, should be {self._gathered}")
