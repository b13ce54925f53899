"""All experts from any placement to any other: every slot holds its expert bit for bit, no byte too many travels."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix
from drumline.workers.collectives import LoneGroup
from drumline.workers.experts import rearrange_expert_weights_inplace
from tests.parity.threadgroup import ThreadGroup, ThreadMember
from tests.parity.threadworld import on_each
from tests.unit.workers.shuffles import (
    EXPERT_BYTES,
    CountingMember,
    check_held,
    least_bytes,
    random_placement,
    rank_weights,
)

LAYERS = 3


def int32(*rows: Sequence[int]) -> I32Matrix:
    return np.array(rows, dtype=np.int32)


def columns(placement: I32Matrix, slots: Sequence[int], position: int) -> I32Matrix:
    bounds = np.cumsum([0, *slots])
    return placement[:, bounds[position] : bounds[position + 1]]


def shuffle(
    old: I32Matrix,
    new: I32Matrix,
    held: Sequence[I32Matrix],
    rank_mapping: Mapping[int, int] | None = None,
    **options: Any,
) -> tuple[list[list[list[Tensor]]], int]:
    """Run it on as many ranks as there are in ``held``, what each has in its slots. Weights after it, bytes sent."""
    ranks = [10 * position for position in range(len(held))]
    group = ThreadGroup(ranks)
    members = [CountingMember(group.member(rank)) for rank in ranks]
    weights = [rank_weights(slots) for slots in held]

    def run(position: int) -> None:
        rearrange_expert_weights_inplace(
            torch.from_numpy(old),
            torch.from_numpy(new),
            weights[position],
            members[position],
            rank_mapping=rank_mapping,
            **options,
        )

    on_each(range(len(held)), run)
    return weights, sum(member.sent for member in members)


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_random_placements_become_random_placements_bit_for_bit_with_the_fewest_bytes(ranks: int, seed: int) -> None:
    draw = np.random.default_rng([ranks, seed])
    slots = draw.integers(1, 7, ranks).tolist()
    experts = int(draw.integers(1, sum(slots) + 1))
    old, new = (random_placement(draw, LAYERS, experts, sum(slots), 0.3) for _ in range(2))
    held = [columns(old, slots, position) for position in range(ranks)]
    weights, sent = shuffle(old, new, held, slots=slots)
    for position in range(ranks):
        check_held(weights[position], columns(new, slots, position))
    assert sent == least_bytes(old, new, slots)


def test_even_slots_need_no_word_and_uneven_ones_are_shared_out_first_ranks_first() -> None:
    old = int32([0, 1, 2, 3, 4], [4, 3, 2, 1, 0])
    new = int32([4, 3, 2, 1, 0], [0, 1, 2, 3, 4])
    weights, sent = shuffle(old, new, [old[:, :3], old[:, 3:]])
    check_held(weights[0], new[:, :3])
    check_held(weights[1], new[:, 3:])
    assert sent == 2 * 4 * EXPERT_BYTES


def test_a_second_slot_of_a_rank_copies_the_first() -> None:
    old, new = int32([0, 0, 0, 1]), int32([1, 1, 0, 1])
    weights, sent = shuffle(old, new, [old[:, :2], old[:, 2:]])
    check_held(weights[0], new[:, :2])
    assert sent == EXPERT_BYTES


def test_slots_that_change_places_on_one_rank_send_nothing() -> None:
    old, new = int32([0, 1, 2, 3]), int32([1, 0, 3, 2])
    weights, sent = shuffle(old, new, [old[:, :2], old[:, 2:]])
    check_held(weights[0], new[:, :2])
    check_held(weights[1], new[:, 2:])
    assert sent == 0


def test_what_no_slot_wants_is_left_where_it_is() -> None:
    old, new = int32([0, 1, 2, 3]), int32([-1, 1, -1, -1])
    weights, sent = shuffle(old, new, [old[:, :2], old[:, 2:]])
    check_held(weights[0], old[:, :2])
    check_held(weights[1], old[:, 2:])
    assert sent == 0


def test_a_rank_alone_copies_among_its_slots() -> None:
    weights = rank_weights(int32([0, 1, -1]))
    old, new = torch.tensor([[0, 1, -1]]), torch.tensor([[1, 0, 1]])
    rearrange_expert_weights_inplace(old, new, weights, LoneGroup())
    check_held(weights, int32([1, 0, 1]))


def test_a_profile_takes_the_memory_of_the_largest_layer_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    empty_like = torch.empty_like

    def counted(tensor: Tensor) -> Tensor:
        taken.append(tensor.nbytes)
        return empty_like(tensor)

    old, new = torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[3, 2, 1, 0]] * 2)
    weights = [[torch.zeros(2, 8)], [torch.ones(2, 16), torch.ones(2)]]
    member = CountingMember(ThreadGroup(range(2)).member(0))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", counted)
        rearrange_expert_weights_inplace(old, new, weights, member, is_profile=True)
    assert taken == [2 * 16 * 4, 2 * 4]
    assert (float(weights[0][0].sum()), float(weights[1][0].sum())) == (0.0, 32.0)
    assert member.sent == 0


class _WatchedMember(CountingMember):
    """Knows how much of what has arrived is still there."""

    def __init__(self, member: ThreadMember) -> None:
        super().__init__(member)
        self.arrived: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> Any:
        pending = self.member.irecv(shape, dtype, src)
        return SimpleNamespace(wait=lambda: self._note(pending.wait()))

    def _note(self, tensor: Tensor) -> Tensor:
        self.arrived.append(weakref.ref(tensor))
        self.peak = max(self.peak, sum(found.nbytes for ref in self.arrived if (found := ref()) is not None))
        return tensor


def test_no_more_than_one_layer_waits_beside_the_weights() -> None:
    old, new = int32(*[[0, 1, 2, 3]] * 4), int32(*[[2, 3, 0, 1]] * 4)
    group = ThreadGroup(range(2))
    members = [_WatchedMember(group.member(rank)) for rank in range(2)]
    old_t, new_t = torch.from_numpy(old), torch.from_numpy(new)

    def run(rank: int) -> None:
        rearrange_expert_weights_inplace(old_t, new_t, rank_weights(columns(old, [2, 2], rank)), members[rank])

    on_each(range(2), run)
    assert [member.peak for member in members] == [2 * EXPERT_BYTES] * 2


def test_holders_share_the_sending() -> None:
    """Ranks 0 and 1 hold the expert that 2 and 3 need."""
    old, new = int32([0, 0, 1, 1]), int32([0, 0, 0, 0])
    group = ThreadGroup(range(4))
    members = [CountingMember(group.member(rank)) for rank in range(4)]
    old_t, new_t = torch.from_numpy(old), torch.from_numpy(new)

    def run(rank: int) -> None:
        rearrange_expert_weights_inplace(old_t, new_t, rank_weights(old[:, rank : rank + 1]), members[rank])

    on_each(range(4), run)
    assert [member.sent // EXPERT_BYTES for member in members] == [1, 1, 0, 0]


class _NodeMember(CountingMember):
    """Ranks 0 and 1 are on one node, 2 and 3 on another."""

    def in_the_same_node_as(self, src: int) -> list[bool]:
        return [rank // 2 == src // 2 for rank in range(4)]


def test_the_nearest_holder_sends() -> None:
    old, new = int32([0, 1, 1, 0]), int32([0, 1, 0, 0])
    group = ThreadGroup(range(4))
    members = [_NodeMember(group.member(rank)) for rank in range(4)]
    old_t, new_t = torch.from_numpy(old), torch.from_numpy(new)

    def run(rank: int) -> None:
        rearrange_expert_weights_inplace(old_t, new_t, rank_weights(old[:, rank : rank + 1]), members[rank])

    on_each(range(4), run)
    assert [member.sent // EXPERT_BYTES for member in members] == [0, 0, 0, 1]


# --------------------------------------------------------------------------------------------------- ranks come and go


@pytest.mark.parametrize("gone", range(4))
def test_four_ranks_become_three_and_the_one_that_goes_gives_what_it_has(gone: int) -> None:
    draw = np.random.default_rng(gone)
    slots, experts = [3, 4, 2, 3], 7
    staying = [rank for rank in range(4) if rank != gone]
    mapping = {rank: staying.index(rank) if rank != gone else -1 for rank in range(4)}
    old = random_placement(draw, LAYERS, experts, sum(slots), 0.0)
    after = [slots[rank] for rank in staying]
    new = random_placement(draw, LAYERS, experts, sum(after), 0.2)
    held = [columns(old, slots, rank) for rank in range(4)]
    weights, sent = shuffle(old, new, held, mapping, slots=slots)
    for rank in staying:
        check_held(weights[rank], columns(new, after, mapping[rank]))
    check_held(weights[gone], held[gone])
    kept = np.concatenate([held[rank] for rank in staying], axis=1)
    assert sent == least_bytes(kept, new, after)


def test_ranks_may_take_each_others_numbers_when_one_goes() -> None:
    old, new = int32(range(8)), int32([6, 7, 0, 1, 2, 3])
    mapping = {0: 2, 1: -1, 2: 0, 3: 1}
    weights, sent = shuffle(old, new, [old[:, 2 * rank : 2 * rank + 2] for rank in range(4)], mapping)
    for rank, to in ((0, 2), (2, 0), (3, 1)):
        check_held(weights[rank], new[:, 2 * to : 2 * to + 2])
    assert sent == 6 * EXPERT_BYTES


def test_three_ranks_become_four_and_the_new_one_gets_its_experts() -> None:
    old, new = int32(range(6), range(6)), int32([0, 1, 2, 3, 4, 5, 0, 5], [6 - n for n in (1, 2, 3, 4, 5, 6, 1, 2)])
    held = [old[:, 0:2], old[:, 2:4], old[:, 4:6], int32([-1, -1], [-1, -1])]
    weights, sent = shuffle(old, new, held, {0: 0, 1: 1, 2: 2})
    for rank in range(4):
        check_held(weights[rank], new[:, 2 * rank : 2 * rank + 2])
    assert sent == least_bytes(np.concatenate(held, axis=1), new, [2] * 4)


def test_three_new_ranks_without_the_fourth_take_the_copies_that_are_left() -> None:
    """The rank has died: it is not in the group any more."""
    old, new = int32([0, 1, 2, 3, 4, 0, 1, 2]), int32([4, 3, 2, 1, 0, 2])
    held = [old[:, 0:2], old[:, 2:4], old[:, 4:6]]
    weights, _ = shuffle(old, new, held, {0: 0, 1: 1, 2: 2, 3: -1})
    for rank in range(3):
        check_held(weights[rank], new[:, 2 * rank : 2 * rank + 2])


def test_uneven_old_ranks_are_read_by_their_own_slots() -> None:
    old, new = int32([0, 1, 2, 0, 1, 3, 3, 2]), int32([3, 1, 2, 0, 3, 1])
    held = [int32([2, 0, 1]), int32([3, 3, 2])]
    options = {"slots": [3, 3], "old_slots": [2, 3, 3]}
    weights, _ = shuffle(old, new, held, {0: -1, 1: 0, 2: 1}, **options)
    check_held(weights[0], new[:, :3])
    check_held(weights[1], new[:, 3:])


def test_an_expert_that_only_a_rank_that_is_gone_had_is_named() -> None:
    old, new = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]]), torch.tensor([[0, 1, 2], [2, 1, 0]])
    weights = rank_weights(int32([0], [0]))
    with pytest.raises(InvalidConfig, match=r"no copy of experts \[0\] of MoE layer 0; "):
        rearrange_expert_weights_inplace(
            old, new, weights, ThreadGroup(range(3)).member(0), rank_mapping={0: -1, 1: 0, 2: 1, 3: 2}
        )
    check_held(weights, int32([0], [0]))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old": [0, 1, 2, 3]}, r"old_global_expert_indices.*MoE layers, physical experts"),
        ({"new": [[0, 1, 2, -2]]}, "new_global_expert_indices.*expert -2"),
        ({"new": [[0, 1, 2, 3]] * 2}, "new_global_expert_indices.*2 MoE layers"),
        ({"new": [[0, 1, 2, 7]]}, r"no copy of experts \[7\] of MoE layer 0"),
        ({"new": [[0, 1, 2]]}, r"new_global_expert_indices.*3 physical experts.*4"),
        ({"slots": [3, 2]}, r"slots.*\[3, 2\].*add up to the 4"),
        ({"slots": [3, 1]}, r"expert_weights.*shape \[2, 3, 4\] in MoE layer 0.*3 local physical experts"),
        ({"rank_mapping": {0: 0, 2: 1}}, r"rank_mapping.*old ranks \[0, 2\]"),
        ({"rank_mapping": {0: 1, 1: 1}}, r"rank_mapping.*new ranks \[1, 1\]"),
        ({"rank_mapping": {0: 0, 1: 1, 2: 3}}, r"rank_mapping.*new ranks \[0, 1, 3\].*0 to 1"),
        ({"weights": []}, "expert_weights.*0 layers.*1"),
        ({"ep_group": object()}, "ep_group.*object.*ProcessGroup"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_moves(change: dict[str, Any], said: str) -> None:
    member = ThreadGroup(range(2)).member(0)
    arguments: dict[str, Any] = {"old": [[0, 1, 2, 3]], "new": [[3, 2, 1, 0]], "ep_group": member} | change
    weights = rank_weights(int32([0, 1]))
    options: dict[str, Any] = {name: arguments[name] for name in ("slots", "rank_mapping") if name in arguments}
    with pytest.raises(InvalidConfig, match=said):
        rearrange_expert_weights_inplace(
            torch.tensor(arguments["old"]),
            torch.tensor(arguments["new"]),
            arguments.get("weights", weights),
            arguments["ep_group"],
            **options,
        )
    check_held(weights, int32([0, 1]))
