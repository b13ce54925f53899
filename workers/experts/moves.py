"""Experts from slot to slot, between ranks and on one: which there are, and how they travel.

All ranks go through the moves of a layer in the same order, a few at a time: what a rank sends and receives of a round
is started in that order and waited for at its end, so that nobody waits for a message that the other one has not
started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import I32, I32Matrix
from drumline.protocol.placement import PlacementMaps
from drumline.workers.collectives import Group, PendingRecv, PendingSend
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.expert_layer import ExpertLayer, ExpertWeights

CHECKPOINT = -1
ROUND = 8
"""Moves of a round. Two messages each, fewer than a group holds unread."""


@dataclass(frozen=True, slots=True)
class Move:
    """``expert`` of MoE layer ``number`` comes to ``slot`` of rank ``target``, from ``source_slot`` of rank ``source``
    (-1: from the checkpoint). Ranks are those of the whole world, slots are counted within their rank."""

    number: int
    target: int
    slot: int
    expert: int
    source: int
    source_slot: int


def read_moves(
    epoch: EpochPlace, maps: PlacementMaps, layer_stage: Sequence[int], fetches: I32Matrix
) -> tuple[Move, ...]:
    """The moves that ``fetches`` (see Configure) order, in order. ``layer_stage``: the stage of each MoE layer.

    Raises ProtocolError for a layer, a slot or a source that cannot be.
    """
    layout = epoch.layout
    stages = [
        epoch.world_ranks(layout.expert_group(layout.global_rank(0, stage)))
        for stage in range(layout.pipeline_parallel_size)
    ]
    moves = []
    for number, physical, source, source_slot in np.asarray(fetches).tolist():
        if not 0 <= number < len(layer_stage) or not 0 <= physical < maps.num_slots:
            valid = f"layers below {len(layer_stage)}, slots below {maps.num_slots}"
            raise ProtocolError(
                f"an expert is to be fetched into slot {physical} of MoE layer {number}; valid: {valid}"
            )
        if source < CHECKPOINT or source_slot < 0:
            raise ProtocolError(f"an expert is to come from slot {source_slot} of rank {source}")
        moves.append(move_of(number, maps, number, stages[layer_stage[number]], physical, source, source_slot))
    return tuple(moves)


def move_of(
    number: int, maps: PlacementMaps, row: int, stage: Sequence[int], physical: int, source: int, source_slot: int
) -> Move:
    """One move of MoE layer ``number``, which is number ``row`` of ``maps``; ``stage``: its ranks, by ep rank."""
    ep_rank = int(maps.slot_rank[physical])
    slot = physical - int(maps.rank_offsets[ep_rank])
    return Move(number, stage[ep_rank], slot, int(maps.physical_to_logical[row, physical]), source, source_slot)


def check_moves(layer: ExpertLayer, moves: Sequence[Move], me: int, wanted: I32 | None) -> None:
    """Raises ProtocolError unless rank ``me`` has what it is to send in ``layer``, and every slot will hold what is
    ``wanted`` of it, int32 (slots,); None: the rank keeps what it has."""
    fetched: dict[int, int] = {}
    for move in moves:
        if move.source == me and not layer.holds(move.source_slot, move.expert):
            again = move.target == me and fetched.get(move.source_slot) == move.expert
            if not again:
                raise ProtocolError(f"slot {move.source_slot} of MoE layer {layer.number} does not hold {move.expert}")
        if move.target == me:
            fetched[move.slot] = move.expert
    if wanted is None:
        return
    for slot, expert in enumerate(wanted.tolist()):
        if slot not in fetched and not (slot < layer.num_slots and layer.holds(slot, expert)):
            raise ProtocolError(f"nothing brings expert {expert} into slot {slot} of MoE layer {layer.number}")


def bring(
    layer: ExpertLayer, moves: Sequence[Move], me: int, transfer: Group | None, check: Callable[[], None]
) -> dict[int, ExpertWeights]:
    """Send what others need of ``layer``, and return by slot what comes for rank ``me``, from others and from slots of
    its own; nothing of the layer is written to. Moves out of the checkpoint are left out, and so are those out of slots
    that are themselves yet to be filled.

    Raises what ``check`` raises, which is called before each round, and EpochAborted, PeerLost, GroupTimeout.
    """
    arrived: dict[int, ExpertWeights] = {}
    moving = [move for move in moves if move.source != CHECKPOINT]
    for first in range(0, len(moving), ROUND):
        check()
        arrived |= _round(layer, moving[first : first + ROUND], me, transfer)
    return arrived


def _round(layer: ExpertLayer, moves: Sequence[Move], me: int, transfer: Group | None) -> dict[int, ExpertWeights]:
    arrived: dict[int, ExpertWeights] = {}
    sends: list[PendingSend] = []
    receives: list[tuple[int, PendingRecv, PendingRecv]] = []
    shapes = [part.shape[1:] for part in (layer.moe.experts.gate_up, layer.moe.experts.down)]
    dtype = layer.moe.experts.down.dtype
    for move in moves:
        if move.source == me == move.target:
            if layer.holds(move.source_slot, move.expert):
                arrived[move.slot] = _copied(layer.source(move.source_slot))
        elif move.source == me:
            group = _needed(transfer, move)
            sends += [group.isend(part, move.target) for part in layer.source(move.source_slot)]
        elif move.target == me:
            group = _needed(transfer, move)
            gate_up, down = (group.irecv(shape, dtype, move.source) for shape in shapes)
            receives.append((move.slot, gate_up, down))
    for slot, first, second in receives:
        arrived[slot] = first.wait(), second.wait()
    for send in sends:
        send.wait()
    return arrived


def _copied(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    gate_up, down = weights
    return gate_up.clone(), down.clone()


def _needed(transfer: Group | None, move: Move) -> Group:
    if transfer is None:
        raise ProtocolError(f"an expert goes from rank {move.source} to rank {move.target}, and they have no group")
    return transfer
