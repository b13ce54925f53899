"""The ranks that a plan is for, and whether a request fits together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drumline.engine.core.balance.plan import POLICIES, PlanRequest
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix


@dataclass(frozen=True, slots=True, eq=False)
class LiveRanks:
    """The ranks that count: those with slots that are not dead. ``ranks`` their numbers, ``slots`` and ``nodes`` of
    each, ``columns`` bool (all slots,) theirs, ``slot_rank`` (all slots,): -1 for those of others."""

    ranks: I32
    slots: I32
    nodes: I32
    columns: np.ndarray[tuple[int], np.dtype[np.bool_]]
    slot_rank: I32

    @property
    def own_rank(self) -> I32:
        """int32 (live slots,): whose each is, counted among live ranks."""
        return np.repeat(np.arange(len(self.ranks), dtype=np.int32), self.slots)


def live_ranks(request: PlanRequest) -> LiveRanks:
    """Raises InvalidConfig naming the field."""
    layers, slots, ranks = request.num_layers, request.slots, len(request.slots)
    total, experts = int(slots.sum()), request.load.shape[-1]
    if request.policy not in POLICIES:
        raise InvalidConfig("policy", request.policy, "one of " + ", ".join(POLICIES))
    if layers < 1 or request.load.ndim != 2 or not len(request.load) or len(request.load) % layers or not experts:
        raise InvalidConfig(
            "load", f"{request.load.shape}", f"(snapshots * {layers} layers, experts), one or more each"
        )
    if not np.isfinite(request.load).all() or request.load.min() < 0:
        raise InvalidConfig("load", "numbers below 0 or not finite", "finite numbers from 0")
    if not ranks or slots.min() < 0 or len(request.nodes) != ranks:
        raise InvalidConfig("nodes", f"{len(request.nodes)} for {ranks} ranks", "one for each rank, slots from 0")
    for name, placement in (("placement", request.placement), ("target", request.target)):
        if name == "target" and not len(placement):
            continue
        if placement.shape != (layers, total):
            raise InvalidConfig(name, f"{placement.shape}", f"int32 ({layers}, {total}), (layers, slots)")
        if placement.size and (placement.min() < -1 or placement.max() >= experts):
            raise InvalidConfig(name, f"experts {placement.min()} to {placement.max()}", f"-1 to {experts - 1}")
    if len(request.dead) and (request.dead.min() < 0 or request.dead.max() >= ranks):
        raise InvalidConfig("dead", request.dead.tolist(), f"ranks from 0 to {ranks - 1}")
    for name in ("max_moved", "min_gain"):
        if not 0.0 <= getattr(request, name) <= 1.0:
            raise InvalidConfig(name, getattr(request, name), "a share from 0 to 1")
    return _of(request)


def _of(request: PlanRequest) -> LiveRanks:
    alive = request.slots > 0
    alive[request.dead] = False
    ranks = np.flatnonzero(alive).astype(np.int32)
    slot_rank = np.repeat(np.where(alive, np.arange(len(alive)), -1), request.slots).astype(np.int32)
    _, nodes = np.unique(request.nodes[ranks], return_inverse=True)
    return LiveRanks(ranks, request.slots[ranks], nodes.astype(np.int32), slot_rank >= 0, slot_rank)


def need_room(request: PlanRequest, live: LiveRanks) -> None:
    room, experts = int(live.slots.sum()), request.load.shape[1]
    if room < experts:
        raise InvalidConfig(
            "slots", f"{room} on {len(live.ranks)} live ranks", f"{experts} or more, one for each expert"
        )


def put_back(request: PlanRequest, live: LiveRanks, placement: I32Matrix) -> I32Matrix:
    """With the slots of other ranks as they are."""
    whole = request.placement.copy()
    whole[:, live.columns] = placement
    return whole
