"""All experts of a group of ranks from one placement to another, at once and in place.

This is the call that users of vLLM know. An engine of ours moves its experts while steps run instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix
from drumline.workers.experts.process_group import AnyGroup, ExpertGroup, expert_group
from drumline.workers.experts.rearrange_plan import SlotChange, check_sources, plan_layer, read_change


def rearrange_expert_weights_inplace(
    old_global_expert_indices: Tensor,
    new_global_expert_indices: Tensor,
    expert_weights: Sequence[Iterable[Tensor]],
    ep_group: AnyGroup,
    is_profile: bool = False,
    rank_mapping: Mapping[int, int] | None = None,
    *,
    slots: Sequence[int] | None = None,
    old_slots: Sequence[int] | None = None,
) -> None:
    """Bring the experts of ``new_global_expert_indices`` into the slots of all ranks. Every rank of the group calls it
    with the same arguments, its own weights apart; none may compute with them meanwhile.

    Only experts that a rank has not travel, each once per receiving rank; slots of the same rank copy. No rank sends
    two or receives two at once. Received experts wait beside the weights until their layer is complete, so that
    more than one layer's worth of memory is never taken.

    Args:
        old_global_expert_indices, new_global_expert_indices: integers (MoE layers, physical experts), the logical
            expert of each slot, rank after rank; -1 for a slot that holds none, or is to hold none.
        expert_weights: per layer the tensors of this rank, each (local physical experts, ...), of any dtype.
        ep_group: a group of ours (:class:`~drumline.workers.groups.GroupCoordinator`, formed with ``connect``), or a
            ``torch.distributed.ProcessGroup`` on whose backend the weights may travel.
        is_profile: check the arguments and take the staging memory once, as a measurement of peaks wants; move nothing.
        rank_mapping: old rank to new rank, -1 for gone. With an entry for each rank of the group, that is the group of
            the old ranks: those that go give what they have, and their own slots keep it. Otherwise the group is that
            of the new ranks, more or fewer: what only those had that are gone is lost.
        slots: how many slots each rank of the group has; None: shared out evenly, the first ranks one more.
        old_slots: the same of the old ranks, where the group is that of the new ones.

    Raises:
        InvalidConfig: arguments that do not fit each other, or an expert that no rank of the group holds, named with
            its layer; nothing has moved.
        EpochAborted, PeerLost, GroupTimeout: as every operation of the group; slots may then hold anything.
    """
    weights = [tuple(layer) for layer in expert_weights]
    group = expert_group(ep_group, weights[0][0].device if weights and weights[0] else torch.device("cpu"))
    old, new = _numbers(old_global_expert_indices), _numbers(new_global_expert_indices)
    change = read_change(old, new, group.world_size, rank_mapping, slots, old_slots)
    _check_weights(weights, change, group.rank_in_group)
    check_sources(change)
    if is_profile:
        _take_staging(weights)
        return
    near = _near(group)
    for layer, tensors in enumerate(weights):
        fetches, rounds = plan_layer(change, layer, near)
        _move_layer(change, layer, tensors, group, [fetches[first:end] for first, end in pairwise(rounds.tolist())])


def _numbers(indices: Tensor) -> I32Matrix:
    array: I32Matrix = torch.as_tensor(indices).detach().cpu().numpy()
    return array


def _check_weights(weights: Sequence[Sequence[Tensor]], change: SlotChange, position: int) -> None:
    if len(weights) != len(change.held):
        raise InvalidConfig("expert_weights", f"{len(weights)} layers", f"{len(change.held)}, as in the placements")
    own = change.slots_of(position)
    for layer, tensors in enumerate(weights):
        for tensor in tensors:
            if not tensor.dim() or len(tensor) != own.stop - own.start:
                found = f"shape {list(tensor.shape)} in MoE layer {layer}"
                raise InvalidConfig("expert_weights", found, f"{own.stop - own.start} local physical experts first")


def _take_staging(weights: Sequence[Sequence[Tensor]]) -> None:
    """Memory for the largest layer, written to, because an allocation alone may be none."""
    largest = max(weights, key=lambda tensors: sum(tensor.nbytes for tensor in tensors), default=())
    for staging in [torch.empty_like(tensor) for tensor in largest]:
        staging.zero_()


def _near(group: ExpertGroup) -> list[list[bool]] | None:
    """Which positions share a node, where the group knows."""
    same_node = getattr(group, "in_the_same_node_as", None)
    return None if same_node is None else [same_node(rank) for rank in group.ranks]


def _move_layer(
    change: SlotChange, layer: int, tensors: Sequence[Tensor], group: ExpertGroup, rounds: Sequence[I32Matrix]
) -> None:
    me = group.rank_in_group
    own = change.slots_of(me)
    held, owner = change.held[layer, own], np.searchsorted(change.offsets, np.arange(change.offsets[-1]), side="right")
    staged: dict[int, Sequence[Tensor]] = {}
    copies: list[tuple[int, int]] = []
    for moves in rounds:
        outgoing: tuple[int, int] | None = None
        incoming: tuple[int, int] | None = None
        for _, physical, source, source_slot in moves.tolist():
            receiver, slot = int(owner[physical]) - 1, physical - own.start
            if source == receiver == me:
                if held[source_slot] == change.wanted[layer, physical]:
                    staged[slot] = [tensor[source_slot].clone() for tensor in tensors]
                else:
                    copies.append((slot, source_slot))
            elif source == me:
                outgoing = receiver, source_slot
            elif receiver == me:
                incoming = source, slot
        staged |= _exchange(tensors, group, outgoing, incoming)
    for slot, arrived in staged.items():
        for tensor, part in zip(tensors, arrived, strict=True):
            tensor[slot].copy_(part)
    for slot, source_slot in copies:
        for tensor in tensors:
            tensor[slot].copy_(tensor[source_slot])


def _exchange(
    tensors: Sequence[Tensor],
    group: ExpertGroup,
    outgoing: tuple[int, int] | None,
    incoming: tuple[int, int] | None,
) -> dict[int, Sequence[Tensor]]:
    """One round of this rank: send the expert in a slot to a position, receive one from a position for a slot."""
    sends, receives = [], []
    me = group.rank_in_group
    # Two ranks that exchange experts: of one communicator's messages one side must start with the other's last.
    for sending in (True, False) if outgoing is None or outgoing[0] > me else (False, True):
        if sending and outgoing is not None:
            sends = [group.isend(tensor[outgoing[1]], group.ranks[outgoing[0]]) for tensor in tensors]
        elif not sending and incoming is not None:
            src = group.ranks[incoming[0]]
            receives = [group.irecv(tensor.shape[1:], tensor.dtype, src) for tensor in tensors]
    arrived = [receive.wait() for receive in receives]
    for send in sends:
        send.wait()
    return {} if incoming is None else {incoming[1]: arrived}
