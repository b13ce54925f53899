"""Requests for plans, and what any plan must keep to."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32Matrix


def even_request(
    load: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    slots: int,
    ranks: int,
    nodes: int = 1,
    policy: str = "incremental",
    placement: I32Matrix | None = None,
    **more: object,
) -> PlanRequest:
    """For a load (layers, experts) or (snapshots, layers, experts); from all experts and then copies in turn."""
    layers, experts = load.shape[-2:]
    trivial = np.tile(np.arange(slots, dtype=np.int32) % experts, (layers, 1))
    fields: dict[str, object] = {"dead": np.zeros(0, dtype=np.int32), "expert_bytes": 100, **more}
    return PlanRequest(
        number=1,
        policy=policy,
        num_layers=layers,
        load=load.reshape(-1, experts).astype(np.float32),
        placement=trivial if placement is None else placement,
        slots=np.asarray(slots_per_rank(slots, ranks), dtype=np.int32),
        nodes=np.repeat(np.arange(nodes, dtype=np.int32), slots_per_rank(ranks, nodes)),
        **fields,  # type: ignore[arg-type]
    )


@st.composite
def requests(draw: st.DrawFn, sound: bool = False) -> PlanRequest:
    """Of any sizes; ``sound``: from a placement that holds all experts, none twice on a rank, and with all ranks."""
    ranks = draw(st.integers(1, 5))
    slots = np.asarray(draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks)), dtype=np.int32)
    slots[0] = max(slots[0], 1)
    total = int(slots.sum())
    layers, times = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = draw(st.integers(int(slots.max()), total) if sound else st.integers(1, total + 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = random.lognormal(0.0, draw(st.sampled_from([0.0, 1.0, 3.0])), (times * layers, experts))
    load[random.random(load.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    placement = random.integers(-1, experts, (layers, total))
    if sound:
        placement = np.tile(np.arange(total) % experts, (layers, 1))
    dead = [] if sound else draw(st.lists(st.integers(0, ranks - 1), max_size=1))
    return PlanRequest(
        number=7,
        policy="incremental",
        num_layers=layers,
        load=load.astype(np.float32),
        placement=placement.astype(np.int32),
        slots=slots,
        nodes=np.asarray(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)), dtype=np.int32),
        dead=np.asarray(dead, dtype=np.int32),
        expert_bytes=10,
        max_moved=draw(st.sampled_from([0.0, 0.1, 0.25, 1.0])),
        min_gain=draw(st.sampled_from([0.0, 0.01, 0.2])),
    )


def slot_rank(request: PlanRequest) -> list[int]:
    """The rank of each slot, -1 for those of dead ranks."""
    ranks = range(len(request.slots))
    return [-1 if rank in request.dead.tolist() else rank for rank in ranks for _ in range(request.slots[rank])]


def held(request: PlanRequest, placement: I32Matrix, layer: int, rank: int) -> list[int]:
    """The experts of a rank, as often as it has them."""
    own = [slot for slot, its in enumerate(slot_rank(request)) if its == rank]
    return sorted(expert for expert in placement[layer, own].tolist() if expert >= 0)


def repairs(request: PlanRequest) -> int:
    """How many slots must change at most: empty ones, second copies on a rank, one for each expert that is nowhere."""
    count = 0
    for layer in range(request.num_layers):
        seen: set[tuple[int, int]] = set()
        for rank, expert in zip(slot_rank(request), request.placement[layer].tolist(), strict=True):
            count += rank >= 0 and (expert < 0 or (rank, expert) in seen)
            seen.add((rank, expert))
        live = {expert for rank, expert in seen if rank >= 0}
        count += request.load.shape[1] - len(live - {-1})
    return count


def carry_out(request: PlanRequest, plan: PlacementPlan) -> I32Matrix:
    """The placement after the moves of ``plan``, each of which must come from a live slot that holds the expert."""
    after, ranks = request.placement.copy(), slot_rank(request)
    for layer, slot, source, copy in plan.moves.tolist():
        expert = plan.placement[layer, slot]
        if source < 0:
            live = [held(request, request.placement, layer, rank) for rank in set(ranks) - {-1}]
            assert copy == -1
            assert not any(expert in one for one in live)
        else:
            assert ranks[copy] == source
            assert request.placement[layer, copy] == expert
        after[layer, slot] = expert
    return after
