"""A placement plan being carried out, layer by layer, beside the steps that run; no I/O.

All ranks that hold a layer are told what travels; steps name the parts to start; when every rank has all that it gets,
one step commits; when every rank has answered that one, steps send the new experts home into their slots, and the next
layer follows. Until the commit a layer can be given up without a trace.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.protocol.messages import I32, CancelStage, I32Matrix, Shuffle, Staged, StageExperts, ToWorker
from drumline.protocol.rounds import pair_rounds

MOST_PARTS = 8
"""Beside one step. A rank holds up to 64 messages of another unread, and several steps are in flight."""


@dataclass(frozen=True, slots=True)
class ToRank:
    """Send ``message`` to ``rank``."""

    rank: int
    message: ToWorker


@dataclass(frozen=True, slots=True, eq=False)
class Pace:
    """``expert_bytes``: of one expert in one layer; at most ``bytes_per_step`` of them beside a step, and at least one
    part. ``deadline_s``: how long ranks may take from the last part on."""

    expert_bytes: int
    bytes_per_step: int
    deadline_s: float

    @property
    def parts(self) -> int:
        """In how many an expert is cut."""
        return max(1, -(-self.expert_bytes // self.bytes_per_step))

    @property
    def parts_per_step(self) -> int:
        """How many a rank may send, and receive, beside one step."""
        within = self.bytes_per_step * self.parts // max(self.expert_bytes, 1)
        return max(1, min(within, MOST_PARTS))

    @property
    def rounds_per_step(self) -> int:
        """How many experts a rank may copy into their slots beside one step."""
        return max(1, self.bytes_per_step // max(self.expert_bytes, 1))


class _Phase(enum.IntEnum):
    STARTING = 0
    """Parts are named in steps."""
    COMING = 1
    """All parts have been named; not all ranks are Staged."""
    STAGED = 2
    """The next step commits."""
    COMMITTED = 3
    """Ranks have yet to answer the step that commits."""
    HOME = 4
    """Steps name the rounds whose experts go into their slots."""
    CANCELLING = 5
    """Ranks have yet to say that they have dropped it."""


@dataclass(slots=True, eq=False)
class _Layer:
    """The layer under way. ``waiting``: the ranks whose word the phase waits for."""

    message: StageExperts
    ranks: frozenset[int]
    phase: _Phase
    waiting: set[int] = field(default_factory=set)
    next_part: int = 0
    next_round: int = 0
    commit_step: int = -1
    since: float = 0.0

    @property
    def num_rounds(self) -> int:
        return len(self.message.rounds) - 1

    @property
    def num_parts(self) -> int:
        return self.num_rounds * self.message.parts


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """``placement``: int32 (slots,), what layer ``layer`` is to hold; ``fetches`` as in StageExperts, unordered;
    ``slots``: how many of the layer's get another expert."""

    layer: int
    placement: I32
    fetches: I32Matrix
    slots: int


@dataclass(slots=True)
class Moved:
    """What has been committed."""

    slots: int = 0
    layers: int = 0
    bytes: int = 0


class ShuffleRun:
    """One plan under way in one epoch. ``generation``: the one of its first layer. What is to be sent gathers in
    :meth:`take`."""

    def __init__(
        self, plans: Sequence[LayerPlan], places: ExpertPlaces, pace: Pace, term: int, epoch: int, generation: int
    ) -> None:
        self._left = list(plans)
        self._places = places
        self._pace = pace
        self._term = term
        self._epoch = epoch
        self.generation = generation
        self.moved = Moved()
        self.cancelled = ""
        self._slots = 0
        self._layer: _Layer | None = None
        self._out: list[ToRank] = []
        self._next_layer()

    # -------------------------------------------------------------------------------------------------------- facts

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self._layer is None

    @property
    def layers_left(self) -> int:
        """Layers that are not in their slots yet."""
        return len(self._left) + (self._layer is not None)

    @property
    def wants_step(self) -> bool:
        """Whether the next step would carry something."""
        return self._layer is not None and self._layer.phase in (_Phase.STARTING, _Phase.STAGED, _Phase.HOME)

    @property
    def due_at(self) -> float | None:
        """When ranks have had their time, None while nothing is awaited of them but answers to steps."""
        layer = self._layer
        if layer is None or layer.phase not in (_Phase.COMING, _Phase.CANCELLING):
            return None
        return layer.since + self._pace.deadline_s

    def late(self) -> tuple[bool, tuple[int, ...]]:
        """Whether a cancel is awaited, and the ranks that are, ascending."""
        layer = self._layer
        if layer is None:
            return False, ()
        return layer.phase is _Phase.CANCELLING, tuple(sorted(layer.waiting))

    # -------------------------------------------------------------------------------------------------------- steps

    def next(self, step: int, now: float) -> tuple[Shuffle | None, tuple[int, I32] | None]:
        """What ``step``, which is planned now, carries, and with a commit the layer and its new placement."""
        layer = self._layer
        if layer is None or not self.wants_step:
            return None, None
        generation = layer.message.generation
        if layer.phase is _Phase.STARTING:
            first = layer.next_part
            layer.next_part = end = min(first + self._pace.parts_per_step, layer.num_parts)
            if end == layer.num_parts:
                layer.phase = _Phase.COMING
                layer.since = now
                self._all_staged(layer)
            return Shuffle(generation, first=first, end=end), None
        if layer.phase is _Phase.STAGED:
            layer.phase = _Phase.COMMITTED
            layer.commit_step = step
            layer.waiting = set(layer.ranks)
            self.moved.slots += self._slots
            self.moved.layers += 1
            return Shuffle(generation, commit=True), (layer.message.layer, layer.message.placement)
        first = layer.next_round
        layer.next_round = end = min(first + self._pace.rounds_per_step, layer.num_rounds)
        if end == layer.num_rounds:
            self._next_layer()
        return Shuffle(generation, home_first=first, home_end=end), None

    def step_done(self, rank: int, step: int) -> None:
        """``rank`` has answered ``step``."""
        layer = self._layer
        if layer is None or layer.phase is not _Phase.COMMITTED or step != layer.commit_step:
            return
        layer.waiting.discard(rank)
        if not layer.waiting:
            layer.phase = _Phase.HOME

    # -------------------------------------------------------------------------------------------------------- ranks

    def staged(self, message: Staged) -> bool:
        """A rank has all of the layer, or has dropped it. False for a word that nobody waits for."""
        layer = self._layer
        if layer is None or message.generation != layer.message.generation or message.rank not in layer.waiting:
            return False
        if layer.phase is _Phase.CANCELLING:
            # One that was staged when it was cancelled says so first.
            if message.dropped:
                layer.waiting.discard(message.rank)
                if not layer.waiting:
                    self._next_layer()
            return True
        if message.dropped or layer.phase > _Phase.COMING:
            return False
        layer.waiting.discard(message.rank)
        self.moved.bytes += message.bytes_received
        self._all_staged(layer)
        return True

    def _all_staged(self, layer: _Layer) -> None:
        if layer.phase is _Phase.COMING and not layer.waiting:
            layer.phase = _Phase.STAGED

    def cancel(self, why: str, now: float) -> None:
        """Move no more layers. One that is committed goes home first; one that is not is dropped."""
        self._left.clear()
        layer = self._layer
        self.cancelled = self.cancelled or why
        if layer is None or layer.phase > _Phase.STAGED:
            return
        layer.phase = _Phase.CANCELLING
        layer.waiting = set(layer.ranks)
        layer.since = now
        self._send(layer.ranks, CancelStage(self._term, self._epoch, layer.message.generation))

    # ----------------------------------------------------------------------------------------------------- messages

    def take(self) -> list[ToRank]:
        """What is to be sent, and forgets it."""
        out, self._out = self._out, []
        return out

    def _send(self, ranks: frozenset[int], message: ToWorker) -> None:
        self._out += [ToRank(rank, message) for rank in sorted(ranks)]

    def _next_layer(self) -> None:
        self._layer = None
        if not self._left:
            return
        plan = self._left.pop(0)
        receivers = self._receivers(plan)
        fetches, rounds = pair_rounds(plan.fetches, receivers)
        message = StageExperts(
            self._term, self._epoch, self.generation, plan.layer, plan.placement, fetches, rounds, self._pace.parts
        )
        self.generation += 1
        self._slots = plan.slots
        ranks = frozenset(self._places.of_layer(plan.layer))
        self._layer = _Layer(message, ranks, _Phase.STARTING, set(ranks))
        self._send(ranks, message)

    def _receivers(self, plan: LayerPlan) -> I32:
        """int32 (fetches,): the global rank that each goes to."""
        ranks = np.asarray(self._places.of_layer(plan.layer), dtype=np.int32)
        found: I32 = ranks[self._places.slot_rank[plan.fetches[:, 1]]]
        return found


def layer_plans(placement: I32Matrix, moves: I32Matrix, places: ExpertPlaces) -> list[LayerPlan]:
    """A plan cut into layers, those with most moves first: ``moves`` int32 (n, 4) as in PlacementPlan."""
    starts = places.starts
    plans: list[LayerPlan] = []
    for layer in np.unique(moves[:, 0]).tolist():
        of_layer = moves[moves[:, 0] == layer]
        # What a rank copies from its own slots waits for nothing.
        of_layer = of_layer[np.argsort(places.slot_rank[of_layer[:, 1]] != of_layer[:, 2], kind="stable")]
        ranks = np.asarray(places.of_layer(layer), dtype=np.int32)
        fetches = of_layer.copy()
        fetches[:, 2] = ranks[of_layer[:, 2]]
        fetches[:, 3] = of_layer[:, 3] - starts[of_layer[:, 2]]
        plans.append(LayerPlan(layer, placement[layer], fetches, len(of_layer)))
    return sorted(plans, key=lambda plan: -plan.slots)
