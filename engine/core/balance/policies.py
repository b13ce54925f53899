"""A plan for a request: which policy makes it, what its placement takes to reach, and why it is as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from drumline.engine.core.balance.forecast import Forecast, forecast
from drumline.engine.core.balance.incremental import Limits, improve
from drumline.engine.core.balance.measure import F64, balancedness, copies
from drumline.engine.core.balance.moves import between_ranks, keep_in_place, moves_between
from drumline.engine.core.balance.plan import POLICIES, PlacementPlan, PlanRequest
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix
from drumline.protocol.rebalance import rebalance_experts


def make_plan(request: PlanRequest, clock: Callable[[], float]) -> PlacementPlan:
    """The plan that the policy of ``request`` makes, or one with ``error``. ``clock`` gives seconds, for ``solve_ms``.

    ``global`` and ``hierarchical`` give the published placement (:func:`rebalance_experts`) for the mean load of the
    snapshots, but with the GPUs of a node, and the slots of a GPU, in another order where more experts stay where they
    are: balance is the same, moves are fewer. They take even slots on all ranks, and none dead. Budgets do not bind
    them. ``incremental`` plans for what the snapshots let expect. A ``target`` is taken as it is.

    Raises InvalidConfig for a request that does not fit together.
    """
    began = clock()
    live = _check(request)
    try:
        if len(request.target):
            seen = Forecast(request.snapshots().mean(axis=0), 0.0, False)
            placement, reason = request.target, "as asked for"
        elif request.policy == "incremental":
            seen = forecast(request.snapshots())
            placement, reason = _incremental(request, seen, live), ""
        else:
            seen = Forecast(request.snapshots().mean(axis=0), 0.0, False)
            placement, reason = _published(request, seen.load, live), ""
    except InvalidConfig as error:
        return PlacementPlan(request.number, request.placement, error=error.text, solve_ms=(clock() - began) * 1e3)
    plan = _describe(request, seen.load, live, placement, reason)
    return msgspec.structs.replace(plan, solve_ms=(clock() - began) * 1e3)


@dataclass(frozen=True, slots=True, eq=False)
class _Live:
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


def _check(request: PlanRequest) -> _Live:
    """Raises InvalidConfig naming the field."""
    layers, slots, ranks = request.num_layers, request.slots, len(request.slots)
    total, experts = int(slots.sum()), request.load.shape[-1]
    if request.policy not in POLICIES:
        raise InvalidConfig("policy", request.policy, "one of " + ", ".join(POLICIES))
    if layers < 1 or request.load.ndim != 2 or not len(request.load) or len(request.load) % layers or not experts:
        raise InvalidConfig("load", f"{request.load.shape}", f"(snapshots * {layers} layers, experts), one or more each")
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
    return _live(request)


def _live(request: PlanRequest) -> _Live:
    alive = request.slots > 0
    alive[request.dead] = False
    ranks = np.flatnonzero(alive).astype(np.int32)
    slot_rank = np.repeat(np.where(alive, np.arange(len(alive)), -1), request.slots).astype(np.int32)
    _, nodes = np.unique(request.nodes[ranks], return_inverse=True)
    return _Live(ranks, request.slots[ranks], nodes.astype(np.int32), slot_rank >= 0, slot_rank)


def _need_room(request: PlanRequest, live: _Live) -> None:
    room, experts = int(live.slots.sum()), request.load.shape[1]
    if room < experts:
        raise InvalidConfig("slots", f"{room} on {len(live.ranks)} live ranks", f"{experts} or more, one for each expert")


def _incremental(request: PlanRequest, seen: Forecast, live: _Live) -> I32Matrix:
    _need_room(request, live)
    standing = np.ascontiguousarray(request.placement[:, live.columns])
    limits = Limits(int(request.max_moved * standing.size), request.min_gain)
    better = improve(standing, seen, live.slots, live.nodes, limits)
    return _put_back(request, live, _stay(standing, better, live, request.load.shape[1]))


def _stay(standing: I32Matrix, better: I32Matrix, live: _Live, experts: int) -> I32Matrix:
    """Undo what only changes the order of a rank's slots, which few layers need."""
    layers, ranks = len(standing), len(live.ranks)
    held = np.zeros((layers, ranks, experts + 1), dtype=np.bool_)
    row, rank = np.arange(layers)[:, None], live.own_rank[None, :]
    held[row, rank, standing] = True
    rows = np.flatnonzero(((better != standing) & held[row, rank, better]).any(axis=1))
    if len(rows):
        better[rows] = keep_in_place(standing[rows], better[rows], live.own_rank)
    return better


def _published(request: PlanRequest, load: F64, live: _Live) -> I32Matrix:
    _need_room(request, live)
    sizes = np.unique(live.slots)
    if len(sizes) != 1:
        raise InvalidConfig("slots", f"{sizes.tolist()} on ranks", f"as many on each for policy {request.policy}")
    ranks, slots, nodes, groups = len(live.ranks), int(live.slots.sum()), 1, 1
    if request.policy == "hierarchical":
        nodes, groups = int(live.nodes.max()) + 1, request.num_groups
        if not (live.nodes == np.repeat(np.arange(nodes), -(-ranks // nodes))[:ranks]).all() or ranks % nodes:
            raise InvalidConfig("nodes", live.nodes.tolist(), "neighbours, as many on each, for policy hierarchical")
    wanted = rebalance_experts(load, slots, groups, nodes, ranks)[0].astype(np.int32)
    standing = np.ascontiguousarray(request.placement[:, live.columns])
    near = np.ones((ranks, ranks), dtype=np.bool_) if nodes == 1 else live.nodes[:, None] == live.nodes[None, :]
    renamed = _rename(standing, wanted, ranks, near, load.shape[1])
    return _put_back(request, live, keep_in_place(standing, renamed, live.own_rank))


def _rename(
    standing: I32Matrix,
    wanted: I32Matrix,
    ranks: int,
    near: np.ndarray[tuple[int, int], np.dtype[np.bool_]],
    experts: int,
) -> I32Matrix:
    """``wanted`` with its ranks in the order that leaves most experts where they are, found greedily; a rank becomes
    one that is ``near`` it."""
    layers = len(standing)
    held = np.zeros((2, layers, ranks, experts + 1), dtype=np.float32)
    row, rank = np.arange(layers)[:, None], np.repeat(np.arange(ranks), standing.shape[1] // ranks)[None, :]
    held[0, row, rank, standing] = 1.0
    held[1, row, rank, wanted] = 1.0
    same = held[0, :, :, :experts] @ held[1, :, :, :experts].transpose(0, 2, 1)
    same = np.where(near[None], same, -np.inf).reshape(layers, -1)
    becomes = np.zeros((layers, ranks), dtype=np.int64)
    layer = np.arange(layers)
    for _ in range(ranks):
        old, new = np.divmod(same.argmax(axis=1), ranks)
        becomes[layer, old] = new
        square = same.reshape(layers, ranks, ranks)
        square[layer, old, :] = -np.inf
        square[layer, :, new] = -np.inf
    by_rank = wanted.reshape(layers, ranks, -1)
    return np.take_along_axis(by_rank, becomes[:, :, None], axis=1).reshape(layers, -1)


def _put_back(request: PlanRequest, live: _Live, placement: I32Matrix) -> I32Matrix:
    """With the slots of other ranks as they are."""
    whole = request.placement.copy()
    whole[:, live.columns] = placement
    return whole


def _describe(request: PlanRequest, load: F64, live: _Live, placement: I32Matrix, reason: str) -> PlacementPlan:
    experts = load.shape[1]
    moves = moves_between(request.placement, placement, live.slot_rank, request.nodes, experts)
    before = float(balancedness(load, request.placement, live.slot_rank).mean())
    after = float(balancedness(load, placement, live.slot_rank).mean())
    travel, far = between_ranks(moves, live.slot_rank, request.nodes)
    if not len(moves):
        why = f"no layer would gain {request.min_gain:g} that chance does not explain"
        reason = f"nothing to move: balancedness is {before:.4f}, {reason or why}"
    else:
        of = f"{len(moves):,} of {len(load) * int(live.slots.sum()):,} slots moved"
        reason = f"balancedness {before:.4f} to {after:.4f} with {of}{', ' if reason else ''}{reason}"
    return PlacementPlan(
        number=request.number,
        placement=placement,
        moves=moves,
        balancedness_before=before,
        balancedness=after,
        slots_moved=len(moves),
        bytes_moved=travel * request.expert_bytes,
        cross_node_bytes=far * request.expert_bytes,
        single_copy=int((copies(placement, experts, live.slot_rank >= 0) == 1).sum()),
        reason=reason,
    )
