"""What a policy is asked and what it answers. Travels to the planner's process and back as messages do."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import numpy as np

from drumline.protocol.messages import I32, NO_FETCHES, NO_MATRIX, I32Matrix

F32Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
POLICIES = ("incremental", "hierarchical", "global")


class PlanRequest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Ranks are ep ranks, slots are numbered rank by rank.

    ``load``: float32 (snapshots * layers, experts), tokens of each logical expert, the oldest snapshot first;
    ``num_layers``: layers. ``placement``: int32 (layers, slots), what stands in each slot, -1 for nothing. ``slots``:
    how many each rank has. ``nodes``: a number for the host of each rank. ``dead``: ranks whose slots do not count and
    stay as they are. ``num_groups``: expert groups of the model, which only hierarchical minds. ``expert_bytes``: of
    one expert in one layer. ``max_moved``: share of all slots that may get another expert; ``min_gain``: by how much
    balancedness must rise for that to be worth it. ``number``: of the request, for its asker. ``target``: where it is
    not (0, 0) the placement is given, and only how to get there is asked.
    """

    number: int
    policy: str
    num_layers: int
    load: F32Matrix
    placement: I32Matrix
    slots: I32
    nodes: I32
    dead: I32
    num_groups: int = 1
    expert_bytes: int = 0
    max_moved: float = 0.25
    min_gain: float = 0.01
    target: I32Matrix = NO_MATRIX

    def snapshots(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """float64 (snapshots, layers, experts)."""
        return self.load.reshape(-1, self.num_layers, self.load.shape[-1]).astype(np.float64)


class PlacementPlan(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The answer. ``placement``: int32 (layers, slots), the one that stands where nothing is worth moving; an expert
    that stays on its rank stays in its slot. ``moves``: int32 (n, 4): layer, slot, the rank that the copy comes from
    (the receiver itself: a local copy; -1: the checkpoint, which only a plan with dead ranks needs) and the copy's
    slot, counted over all ranks; by layer.

    ``balancedness_before`` and ``balancedness``: on the load planned for, which is the mean of the snapshots, or for
    ``incremental`` what they let expect; each copy of an expert takes an even share. ``slots_moved``: how many get
    another expert; ``bytes_moved``: between ranks; ``cross_node_bytes``: of those between hosts. ``single_copy``:
    experts, over all layers, with one copy on a live rank. ``reason``: one sentence for people. ``error``: why there is
    no plan, empty when there is one.
    """

    number: int
    placement: I32Matrix
    moves: I32Matrix = NO_FETCHES
    balancedness_before: float = 1.0
    balancedness: float = 1.0
    slots_moved: int = 0
    bytes_moved: int = 0
    cross_node_bytes: int = 0
    single_copy: int = 0
    solve_ms: float = 0.0
    reason: str = ""
    error: str = ""
