"""How the ranks of :mod:`tests.integration.workers.ranks` change all their experts. Functions run on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed import (  # type: ignore[attr-defined]  # exported, but not in __all__
    PrefixStore,
    ProcessGroup,
    TCPStore,
)

from drumline.protocol.messages import I32Matrix
from drumline.workers.experts import EplbState, rearrange_expert_weights_inplace
from drumline.workers.experts.process_group import expert_group
from drumline.workers.groups import GroupCoordinator
from tests.unit.workers.balanced import Model, Parallel, Settings
from tests.unit.workers.shuffles import check_held, least_bytes, random_placement, rank_weights

if TYPE_CHECKING:
    from tests.integration.workers.ranks import Rank

LAYERS, EXPERTS = 2, 6


class Counted:
    """A group that counts the bytes of its sends."""

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def isend(self, t: Tensor, dst: int) -> Any:
        self.sent += t.nbytes
        return self.group.isend(t, dst)


def _rearrange(
    group: Any,
    weights: list[list[Tensor]],
    old: I32Matrix,
    new: I32Matrix,
    mapping: Mapping[int, int] | None,
    **options: Any,
) -> None:
    rearrange_expert_weights_inplace(
        torch.from_numpy(old), torch.from_numpy(new), weights, group, rank_mapping=mapping, **options
    )


def random_placements_in_turn(rank: Rank) -> list[int]:
    """From each to the next, of as many slots as before; bytes that this rank has sent and the least that all can."""
    draw = np.random.default_rng(rank.world)
    slots = [2 + position + EXPERTS // rank.world for position in range(rank.world)]
    first, end = list(pairwise(np.cumsum([0, *slots]).tolist()))[rank.rank]
    placements = [random_placement(draw, LAYERS, EXPERTS, sum(slots), 0.2) for _ in range(5)]
    group = Counted(rank.form_among("experts", tuple(range(rank.world)), connect=True))
    least = 0
    for old, new in pairwise(placements):
        weights = rank_weights(old[:, first:end])
        _rearrange(group, weights, old, new, None, slots=slots)
        check_held(weights, new[:, first:end])
        least += least_bytes(old, new, slots)
    group.close()
    return [group.sent, least]


def four_ranks_become_three_and_four_again(rank: Rank) -> str:
    """Rank 1 goes, having given what it had, and comes back with nothing."""
    four, three = np.array([[0, 1, 2, 3, 4, 5, 0, 1]] * LAYERS), np.array([[5, 4, 3, 2, 1, 0]] * LAYERS)
    whole = rank.form_among("four", (0, 1, 2, 3), connect=True)
    weights = rank_weights(four[:, 2 * rank.rank : 2 * rank.rank + 2])
    _rearrange(whole, weights, four, three, {0: 0, 1: -1, 2: 1, 3: 2})
    place = {0: 0, 2: 1, 3: 2}.get(rank.rank)
    if place is not None:
        check_held(weights, three[:, 2 * place : 2 * place + 2])
        left = rank.form_among("three", (0, 2, 3), connect=True)
        turned = np.ascontiguousarray(three[:, ::-1])
        _rearrange(left, weights, three, turned, None)
        _rearrange(left, weights, turned, three, None)
        left.close()
    else:
        weights = rank_weights(np.full((LAYERS, 2), -1, dtype=np.int32))
    again = rank.form_among("again", (0, 2, 3, 1), connect=True)
    _rearrange(again, weights, three, four, {0: 0, 1: 1, 2: 2})
    place = again.rank_in_group
    check_held(weights, four[:, 2 * place : 2 * place + 2])
    for group in (whole, again):
        group.close()
    return "held"


def over_a_process_group_of_torch(rank: Rank) -> str:
    store = PrefixStore("mine", TCPStore("127.0.0.1", rank.port, is_master=False, timeout=timedelta(seconds=10)))
    gloo: Any = distributed.ProcessGroupGloo
    backend = gloo(store, rank.rank, rank.world, timedelta(seconds=10))
    group = ProcessGroup(store, rank.rank, rank.world)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    draw = np.random.default_rng(3)
    old, new = (random_placement(draw, LAYERS, EXPERTS, 4 * rank.world, 0.2) for _ in range(2))
    weights = rank_weights(old[:, 4 * rank.rank : 4 * rank.rank + 4])
    _rearrange(group, weights, old, new, None)
    check_held(weights, new[:, 4 * rank.rank : 4 * rank.rank + 4])
    counts = [(3 * position) % 4 for position in range(rank.world)]
    rows = [torch.full((count, 2), position) for position, count in enumerate(counts)]
    adapted = expert_group(group, torch.device("cpu"))
    assert torch.equal(adapted.all_gather_rows(rows[rank.rank], counts), torch.cat(rows))
    assert adapted.all_gather_rows(rows[0], [0] * rank.world).shape == (0, 2)
    # Over its own collectives: whoever is late would otherwise find the others' sockets closed.
    group.barrier().wait()
    return "held"


def rearranged_again_and_again(rank: Rank) -> list[list[list[int]]]:
    """A balancer's steps, with loads of each rank's own; the placements that it comes to."""
    slots = (EXPERTS + 2) // rank.world
    layer = EplbState.build_initial_global_physical_to_logical_map(EXPERTS, 2)
    held = np.array([layer] * LAYERS, dtype=np.int32)[:, slots * rank.rank : slots * (rank.rank + 1)]
    model = Model(held, EXPERTS + 2, EXPERTS)
    group = rank.form_among("experts", tuple(range(rank.world)), connect=True)
    state = EplbState.build(model, torch.device("cpu"), Parallel(Settings(2, 2, 4)), ep_group=group)
    draw, seen = np.random.default_rng(rank.rank), []
    for step in range(9):
        state.expert_load_pass += torch.from_numpy(draw.integers(0, 1000, (LAYERS, slots)))
        state.step(model, is_dummy=step == 3, log_stats=True)
        placement = state.physical_to_logical_map.numpy()
        check_held(model.expert_weights, placement[:, slots * rank.rank : slots * (rank.rank + 1)])
        seen.append(placement.tolist())
    group.close()
    return seen
