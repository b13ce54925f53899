"""How many tokens each expert computes: skewed, drifting, and the same for whoever asks."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from drumline.protocol.messages import I32, I32Matrix, Step, StepDone
from tests.simulation.cluster.expert_slots import ExpertSlots

DRIFT_S = 2.0
PHASES = 8
I64 = np.ndarray[Any, np.dtype[np.int64]]


class Skew:
    """Tokens of each expert for one token of a step: int64 (layers, experts), another one every ``DRIFT_S``."""

    def __init__(self, seed: int, layers: int, experts: int) -> None:
        random = np.random.default_rng(seed)
        weights = random.lognormal(0.0, 1.0, (PHASES, layers, experts)) * 2.0
        self._weights = np.rint(weights).astype(np.int64)

    def at(self, now: float) -> I64:
        """The weights of this moment."""
        found: I64 = self._weights[int(now / DRIFT_S) % PHASES]
        return found


class LoadReports:
    """What the ranks of one epoch count, and report every ``interval`` steps and in steps that commit."""

    def __init__(self, experts: ExpertSlots, skew: Skew, interval: int) -> None:
        self._experts = experts
        self._skew = skew
        self._interval = interval
        self._tokens: I64 = np.zeros_like(skew.at(0.0))
        self._steps = 0
        self._report: tuple[I32Matrix, int] | None = None

    def count(self, step: Step, placement: I32Matrix, now: float) -> tuple[I64, int] | None:
        """``step`` begins, ``placement`` was in force before it. Returns what is reported in its answers: int64
        (layers, experts) tokens of so many steps, or None where it is not due."""
        taken = None
        due = step.step > 0 and step.step % self._interval == 0
        self._report = None
        if due or (step.shuffle is not None and step.shuffle.commit):
            taken = self._tokens, self._steps
            self._report = share_out(self._tokens, placement), self._steps
            self._tokens, self._steps = np.zeros_like(self._tokens), 0
        tokens = int(step.num_tokens_across_dp.sum())
        if tokens:
            self._tokens += tokens * self._skew.at(now)
            self._steps += 1
        return taken

    def report(self, place: int, done: StepDone) -> StepDone:
        """The answer of the member at ``place`` to the step that was counted last."""
        if self._report is None:
            return done
        shared, steps = self._report
        own = self._experts.share(shared, place)
        own = np.ascontiguousarray(own[self._experts.layers_of(place)])
        return msgspec.structs.replace(done, load=own, load_steps=steps)


def share_out(tokens: I64, placement: I32Matrix) -> I32:
    """int32 (layers, slots): the tokens of each expert shared among its copies."""
    layers, slots = placement.shape
    shared = np.zeros((layers, slots), dtype=np.int32)
    for layer, row in enumerate(placement):
        copies = np.bincount(row, minlength=tokens.shape[1])
        order = np.argsort(row, kind="stable")
        first = np.cumsum(copies) - copies
        number = np.empty(slots, dtype=np.int64)
        number[order] = np.arange(slots) - first[row[order]]
        shared[layer] = (tokens[layer, row] + copies[row] - 1 - number) // copies[row]
    return shared
