"""The expert load of recent steps, from what ranks report; no I/O.

Ranks count by slot; what a slot's count says of an expert depends on the placement that was in force in the steps
counted, so the placements that steps in flight may still run with are kept.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.protocol.messages import I32, I32Matrix

F64 = np.ndarray[Any, np.dtype[np.float64]]

FINENESS = 64
"""Reports are joined up to this part of the window: a window of many short ones would fill the memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """``tokens``: float64 (layers, experts), over ``steps`` steps; ``rank_tokens``: float64 (layers, ep ranks), over
    the last ``rank_steps`` of them. ``version``: counts commits; it tells loads of ranks under one placement from
    those under another."""

    steps: int
    tokens: F64
    rank_steps: int
    rank_tokens: F64
    version: int

    def then(self, later: Snapshot) -> Snapshot:
        """Both as one. What ranks did under an older placement is forgotten."""
        steps, tokens = self.steps + later.steps, self.tokens + later.tokens
        if self.version != later.version:
            return Snapshot(steps, tokens, later.rank_steps, later.rank_tokens, later.version)
        rank_tokens = self.rank_tokens + later.rank_tokens
        return Snapshot(steps, tokens, self.rank_steps + later.rank_steps, rank_tokens, later.version)


@dataclass(slots=True, eq=False)
class _Gathering:
    """The reports of one step that have come: tokens by slot, and from whom."""

    tokens: F64
    heard: set[int] = field(default_factory=set)
    steps: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Version:
    """``placement`` holds from step ``first`` on."""

    first: int
    placement: I32Matrix
    number: int


class LoadWindow:
    """The last ``window_size`` steps with tokens, in snapshots of one report of every rank each, or of a few. The
    tokens of experts outlive epochs; whose they were, by rank, is that of the epoch."""

    def __init__(self, window_size: int, num_experts: int) -> None:
        self._limit = window_size
        self._num_experts = num_experts
        self._places: ExpertPlaces | None = None
        self._versions: deque[_Version] = deque()
        self._gathering: dict[int, _Gathering] = {}
        self._snapshots: deque[Snapshot] = deque()
        self.steps = 0
        self.version = 0

    def opened(self, places: ExpertPlaces, placement: I32Matrix) -> None:
        """An epoch opens with this placement; steps count from 0."""
        self._gathering.clear()
        self.version += 1
        self._places = places
        self._versions = deque([_Version(0, placement, self.version)])

    def closed(self) -> None:
        """Steps that have not been reported on are not counted."""
        self._gathering.clear()
        self._places = None

    def commit(self, step: int, placement: I32Matrix) -> None:
        """``placement`` is in force from ``step`` on."""
        self.version += 1
        self._versions.append(_Version(step, placement, self.version))

    def add(self, rank: int, step: int, load: I32Matrix, steps: int) -> Snapshot | None:
        """The report of global rank ``rank`` in its answer to ``step``, int32 (layers of its stage, its slots). Returns
        what all ranks have reported, once this is the last of them. Raises ValueError for one that does not fit."""
        places = self._places
        if places is None:
            return None
        stage, place = _find(places, rank)
        layers, first, end = places.layers_of(stage), places.starts[place], places.starts[place + 1]
        if load.shape != (len(layers), end - first) or (load.size and load.min() < 0) or steps < 0:
            valid = f"({len(layers)}, {end - first}), from 0"
            raise ValueError(f"rank {rank} reports an expert load {load.shape}; valid: {valid}")
        total = len(places.slot_rank)
        gathering = self._gathering.get(step)
        if gathering is None:
            gathering = self._gathering[step] = _Gathering(np.zeros((len(places.layer_stage), total)))
        gathering.tokens[layers, first:end] += load
        gathering.heard.add(rank)
        gathering.steps = max(gathering.steps, steps)
        if len(gathering.heard) < len(places.holders):
            return None
        del self._gathering[step]
        return self._take(step, gathering, places)

    def _take(self, step: int, gathering: _Gathering, places: ExpertPlaces) -> Snapshot:
        # What is reported at a step ended before it; no report spans a commit.
        while len(self._versions) > 1 and self._versions[1].first < step:
            self._versions.popleft()
        version = self._versions[0]
        layers, experts = gathering.tokens.shape[0], self._num_experts
        index = (np.arange(layers)[:, None] * experts + version.placement).ravel()
        flat = np.bincount(index, gathering.tokens.ravel(), layers * experts)
        tokens = flat.astype(np.float64, copy=False).reshape(layers, experts)
        before = np.concatenate([np.zeros((layers, 1)), np.cumsum(gathering.tokens, axis=1)], axis=1)
        rank_tokens = np.diff(before[:, places.starts], axis=1)
        snapshot = Snapshot(gathering.steps, tokens, gathering.steps, rank_tokens, version.number)
        if snapshot.steps:
            self._keep(snapshot)
        return snapshot

    def _keep(self, snapshot: Snapshot) -> None:
        self.steps += snapshot.steps
        if self._snapshots and self._snapshots[-1].steps + snapshot.steps <= self._limit // FINENESS:
            snapshot = self._snapshots.pop().then(snapshot)
        self._snapshots.append(snapshot)
        while self.steps - self._snapshots[0].steps >= self._limit:
            self.steps -= self._snapshots.popleft().steps

    # ------------------------------------------------------------------------------------------------------- read out

    def load(self, most: int) -> tuple[I32, F64]:
        """At most ``most`` snapshots, neighbours joined: int32 (snapshots,) steps and float64 (snapshots, layers,
        experts) tokens, the oldest first."""
        parts = [list(part) for part in np.array_split(np.arange(len(self._snapshots)), most) if len(part)]
        steps = [sum(self._snapshots[i].steps for i in part) for part in parts]
        tokens = [sum((self._snapshots[i].tokens for i in part[1:]), self._snapshots[part[0]].tokens) for part in parts]
        return np.asarray(steps, dtype=np.int32), np.asarray(tokens, dtype=np.float64)

    def rank_load(self) -> tuple[int, F64]:
        """Steps, and float64 (layers, ep ranks) tokens, of the newest snapshots under one placement; 0 and (0, 0)
        before there are any."""
        if not self._snapshots:
            return 0, np.zeros((0, 0))
        newest = self._snapshots[-1].version
        steps, total = 0, np.zeros_like(self._snapshots[-1].rank_tokens)
        for snapshot in reversed(self._snapshots):
            if snapshot.version != newest:
                break
            steps += snapshot.rank_steps
            total = total + snapshot.rank_tokens
        return steps, total


def _find(places: ExpertPlaces, rank: int) -> tuple[int, int]:
    for stage, ranks in enumerate(places.stages):
        if rank in ranks:
            return stage, ranks.index(rank)
    raise ValueError(f"rank {rank} holds no experts of the epoch")


def balance_of(rank_tokens: F64) -> tuple[F64, F64, F64]:
    """float64 (layers,) each: tokens of the mean and of the busiest rank, and the first over the second, 1.0 where
    nobody has any."""
    mean, most = rank_tokens.mean(axis=1), rank_tokens.max(axis=1, initial=0.0)
    return mean, most, np.divide(mean, most, out=np.ones_like(mean), where=most > 0)
