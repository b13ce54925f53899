"""A plan for a request: which policy makes it, what its placement takes to reach, and why it is as it is."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from drumline.engine.core.balance.forecast import Forecast, forecast
from drumline.engine.core.balance.incremental import Limits, improve
from drumline.engine.core.balance.live_ranks import LiveRanks, live_ranks, need_room, put_back
from drumline.engine.core.balance.measure import F64, balancedness, copies
from drumline.engine.core.balance.moves import between_ranks, keep_in_place, moves_between
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.published import published
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix


def make_plan(request: PlanRequest, clock: Callable[[], float]) -> PlacementPlan:
    """The plan that the policy of ``request`` makes, or one with ``error``. ``clock`` gives seconds, for ``solve_ms``.

    ``global`` and ``hierarchical`` give the published placement (:func:`rebalance_experts`) for the mean load of the
    snapshots, but with the GPUs of a node, and the slots of a GPU, in another order where more experts stay where they
    are: balance is the same, moves are fewer. They take as many slots on each live rank. Budgets do not bind them.
    ``incremental`` plans for what the snapshots let expect (:func:`forecast`), a layer only where its balancedness, or
    that of all layers in the mean, rises by ``min_gain``; what must be (every expert somewhere, none twice on a rank)
    is done in any case. A ``target`` is taken as it is.

    Raises InvalidConfig for a request that does not fit together.
    """
    began = clock()
    live = live_ranks(request)
    try:
        load, reason = request.snapshots().mean(axis=0), ""
        if len(request.target):
            placement, reason = request.target, "as asked for"
        elif request.policy == "incremental":
            seen = forecast(request.snapshots())
            load, placement = seen.load, _incremental(request, seen, live)
        else:
            placement = published(request, load, live)
    except InvalidConfig as error:
        return PlacementPlan(request.number, request.placement, error=error.text, solve_ms=(clock() - began) * 1e3)
    plan = _describe(request, load, live, placement, reason)
    return msgspec.structs.replace(plan, solve_ms=(clock() - began) * 1e3)


def _incremental(request: PlanRequest, seen: Forecast, live: LiveRanks) -> I32Matrix:
    need_room(request, live)
    standing = np.ascontiguousarray(request.placement[:, live.columns])
    limits = Limits(int(request.max_moved * standing.size), request.min_gain)
    better = improve(standing, seen, live.slots, live.nodes, limits)
    return put_back(request, live, _stay(standing, better, live, request.load.shape[1]))


def _stay(standing: I32Matrix, better: I32Matrix, live: LiveRanks, experts: int) -> I32Matrix:
    """Undo what only changes the order of a rank's slots, which few layers need."""
    layers, ranks = len(standing), len(live.ranks)
    held = np.zeros((layers, ranks, experts + 1), dtype=np.bool_)
    row, rank = np.arange(layers)[:, None], live.own_rank[None, :]
    held[row, rank, standing] = True
    rows = np.flatnonzero(((better != standing) & held[row, rank, better]).any(axis=1))
    if len(rows):
        better[rows] = keep_in_place(standing[rows], better[rows], live.own_rank)
    return better


def _describe(request: PlanRequest, load: F64, live: LiveRanks, placement: I32Matrix, reason: str) -> PlacementPlan:
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
