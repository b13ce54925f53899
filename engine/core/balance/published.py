"""The policies ``global`` and ``hierarchical``: the published placement, with as much as can be left where it is."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.balance.grid import Bool
from drumline.engine.core.balance.live_ranks import LiveRanks, need_room, put_back
from drumline.engine.core.balance.measure import F64
from drumline.engine.core.balance.moves import keep_in_place
from drumline.engine.core.balance.plan import PlanRequest
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix
from drumline.protocol.rebalance import rebalance_experts


def published(request: PlanRequest, load: F64, live: LiveRanks) -> I32Matrix:
    """The placement for ``load`` (layers, experts), int32 (layers, slots). Raises InvalidConfig for uneven slots, and
    for sizes that do not divide."""
    need_room(request, live)
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
    return put_back(request, live, keep_in_place(standing, renamed, live.own_rank))


def _rename(
    standing: I32Matrix,
    wanted: I32Matrix,
    ranks: int,
    near: Bool,
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
