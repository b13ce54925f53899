"""What the ranks of :mod:`tests.integration.workers.ranks` do. Each function runs on every rank of its world."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drumline.protocol.errors import DrumlineError, ProtocolError
from drumline.workers.abort import EpochAborted
from drumline.workers.experts.expert_layer import ExpertLayer
from drumline.workers.experts.moves import Move, bring, check_moves
from drumline.workers.layers.experts import LocalExperts
from drumline.workers.layers.moe import ExpertExchange, MoeLayer, RoutingView
from drumline.workers.layers.parallel import ModelGroups
from drumline.workers.step_tokens import ReplicaPlace, StepTokens

if TYPE_CHECKING:
    from tests.integration.workers.ranks import Rank

HIDDEN, INTERMEDIATE, TOP_K, SLOTS = 12, 6, 3, 8


def _tokens(rank: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + 10 * rank + count)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    slots = torch.rand(count, SLOTS, generator=generator).argsort(1)[:, :TOP_K]
    return hidden, slots


def _owner(slots: Tensor, world: int) -> Tensor:
    return slots * world // SLOTS


def _expert(hidden: Tensor, slots: Tensor) -> Tensor:
    """The output of each slot for its row: any function of both will do."""
    return torch.sin(hidden * (slots + 1).unsqueeze(1))


def _layer(exchange: ExpertExchange, rank: Rank, counts: list[int], dtype: torch.dtype) -> None:
    hidden, slots = _tokens(rank.rank, counts[rank.rank])
    hidden = hidden.to(dtype)
    owners = _owner(slots.reshape(-1), rank.world)
    all_hidden, all_slots = exchange.dispatch(hidden, slots, owners, counts)
    everyone = [_tokens(r, n) for r, n in enumerate(counts)]
    assert torch.equal(all_hidden, torch.cat([h for h, _ in everyone]).to(dtype))
    assert torch.equal(all_slots, torch.cat([s for _, s in everyone]))
    pairs = all_slots.reshape(-1)
    pair_index = (_owner(pairs, rank.world) == rank.rank).nonzero().view(-1)
    outputs = _expert(all_hidden[pair_index // TOP_K].float(), pairs[pair_index])
    home = exchange.combine(outputs, pair_index, owners)
    assert torch.equal(home, _expert(hidden.float().repeat_interleave(TOP_K, 0), slots.reshape(-1)))


def exchange_many_shapes(rank: Rank) -> str:
    exchange = rank.exchange()
    world = rank.world
    only_last = [0] * world
    only_last[-1] = 5
    uneven = [3 * r for r in range(world)]
    shapes = (
        [1] * world,
        uneven,
        only_last,
        [0] * world,
        uneven[::-1],
        [40] * world,
        only_last[::-1],
        [20000] * world,
        [2] * world,
    )
    for dtype in (torch.float32, torch.bfloat16):
        for counts in shapes:
            _layer(exchange, rank, counts, dtype)
    return "equal"


def moe_layer_equals_local(rank: Rank) -> float:
    """Largest relative difference between a layer split over the ranks and the same layer on one."""
    world, counts = rank.world, [4, 0, 7, 1][: rank.world]
    owner = torch.arange(SLOTS) * world // SLOTS

    def gate(x: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(8)
        scores = (x @ torch.randn(HIDDEN, SLOTS, generator=generator)).softmax(-1)
        return scores.topk(TOP_K)

    def layer(first: int, end: int) -> MoeLayer:
        generator = torch.Generator().manual_seed(7)
        gate_up = torch.randn(SLOTS, 2 * INTERMEDIATE, HIDDEN, generator=generator)
        down = torch.randn(SLOTS, HIDDEN, INTERMEDIATE, generator=generator)
        routing = RoutingView(torch.arange(SLOTS), owner, first, end)
        experts = LocalExperts(gate_up[first:end], down[first:end])
        return MoeLayer(gate, experts, routing, ModelGroups(), None, sharded=False)

    mine = (owner == rank.rank).nonzero().view(-1).tolist()
    split, whole = layer(mine[0], mine[-1] + 1), layer(0, SLOTS)
    split.exchange = rank.exchange()
    hidden, _ = _tokens(rank.rank, counts[rank.rank])
    found = split(hidden, StepTokens.of(counts, ReplicaPlace(rank.rank)))
    expected = whole(hidden, StepTokens.of([len(hidden)], ReplicaPlace()))
    return float((found - expected).norm() / expected.norm()) if len(hidden) else 0.0


def experts_change_places(rank: Rank) -> str:
    """Every expert of every rank goes on to another one, more of them than a group holds unread, small and large."""
    group = rank.form_among("transfer", tuple(range(rank.world)), connect=True)
    for intermediate, slots in ((2, 50), (HIDDEN * 200, 12)):
        # Slot s of rank r holds expert r * slots + s, and gets the one of slot s + 1 of the rank before.
        held = [range(r * slots, (r + 1) * slots) for r in range(rank.world)]
        gate_up = torch.stack([torch.full((2 * intermediate, HIDDEN), float(e)) for e in held[rank.rank]])
        down = torch.stack([torch.full((HIDDEN, intermediate), -float(e)) for e in held[rank.rank]])
        experts = LocalExperts(gate_up, down)
        nowhere = RoutingView.nowhere(torch.device("cpu"))
        moe = MoeLayer(lambda x: (x, x), experts, nowhere, ModelGroups(), None, sharded=False)
        layer = ExpertLayer(moe, 0, 0, held[rank.rank], (0, intermediate))
        moves = []
        for target in range(rank.world):
            source = (target - 1) % rank.world
            moves += [Move(0, target, s, held[source][(s + 1) % slots], source, (s + 1) % slots) for s in range(slots)]
        check_moves(layer, moves, rank.rank, None)
        arrived = bring(layer, moves, rank.rank, group, lambda: None)
        assert sorted(arrived) == list(range(slots))
        before = held[(rank.rank - 1) % rank.world]
        for slot, (one, other) in arrived.items():
            expert = before[(slot + 1) % slots]
            assert torch.equal(one, torch.full_like(one, float(expert)))
            assert torch.equal(other, torch.full_like(other, -float(expert)))
    group.barrier(5.0)
    group.close()
    return "equal"


def wrong_counts(rank: Rank) -> list[str]:
    exchange = rank.exchange()
    hidden, slots = _tokens(rank.rank, 2)
    refused = []
    for counts in ([2] * (rank.world + 1), [3] * rank.world):
        try:
            exchange.dispatch(hidden, slots, _owner(slots.reshape(-1), rank.world), counts)
        except ProtocolError as error:
            refused.append(error.text)
    _layer(exchange, rank, [2] * rank.world, torch.float32)  # nothing was sent: the group is as good as before
    return refused


def abort_while_peer_is_stopped(rank: Rank) -> dict[str, Any]:
    """Rank 1 stops itself; rank 0 is told to leave while it waits, and goes on by itself in a new group."""
    exchange = rank.exchange()
    group = rank.group
    _layer(exchange, rank, [2, 2], torch.float32)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    told = [0.0]

    def tell() -> None:
        told[0] = time.monotonic()
        rank.abort.abort_before(1, 2, "the test says so")

    timer = threading.Timer(0.2, tell)
    timer.start()
    kind, entered = "", False
    try:
        _layer(exchange, rank, [2, 2], torch.float32)
    except EpochAborted as error:
        kind, entered = error.info.kind, rank.progress.position.collective > 2
    returned = time.monotonic()
    group.close()
    closed = time.monotonic()
    alone = rank.form(epoch=2, world=1)
    output = torch.zeros(1, 2)
    alone.all_to_all(output, torch.ones(1, 2), [1], [1])
    return {
        "kind": kind,
        "entered": entered,
        "left_ms": 1e3 * (returned - told[0]),
        "close_ms": 1e3 * (closed - returned),
        "alone": output.tolist(),
    }


def peer_dies(rank: Rank) -> dict[str, Any]:
    """The last rank is killed while the others wait for it; whoever sees it first closes its group."""
    exchange = rank.exchange()
    group = rank.group
    _layer(exchange, rank, [1] * rank.world, torch.float32)
    if rank.rank == rank.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        _layer(exchange, rank, [1] * rank.world, torch.float32)
    except DrumlineError as error:
        group.close()
        return {"kind": error.kind, "text": error.text, "ms": 1e3 * (time.monotonic() - start)}
    return {"kind": "none"}


def form_without_peer(rank: Rank) -> str:
    if rank.rank == rank.world - 1:
        return "absent"
    try:
        rank.form(deadline_s=0.5)
    except DrumlineError as error:
        return f"{error.kind}: {error.text}"
    return "formed"


def abandon_forming(rank: Rank) -> dict[str, Any]:
    if rank.rank == rank.world - 1:
        return {"kind": "absent"}
    threading.Timer(0.1, rank.abort.abort_all, ["shutdown"]).start()
    start = time.monotonic()
    try:
        rank.form()
    except EpochAborted as error:
        return {"kind": error.kind, "ms": 1e3 * (time.monotonic() - start)}
    return {"kind": "formed"}


def latency(rank: Rank) -> dict[str, float]:
    """Median microseconds of one layer's two exchanges, by tokens per replica. Printed, not asserted."""
    exchange = rank.exchange()
    figures = {}
    for tokens in (0, 1, 8, 64):
        hidden = torch.randn(tokens, 256)
        slots = torch.randint(0, SLOTS, (tokens, TOP_K))
        counts = [tokens] * rank.world
        owners = _owner(slots.reshape(-1), rank.world)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            all_hidden, all_slots = exchange.dispatch(hidden, slots, owners, counts)
            middle = time.perf_counter()
            pairs = all_slots.reshape(-1)
            pair_index = (_owner(pairs, rank.world) == rank.rank).nonzero().view(-1)
            outputs = all_hidden[pair_index // TOP_K]
            after = time.perf_counter()
            exchange.combine(outputs, pair_index, owners)
            times.append((middle - start) + (time.perf_counter() - after))
        figures[str(tokens)] = round(1e6 * statistics.median(times), 1)
    return figures
