"""The experts of one layer on one rank, with a record of what really stands in each slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.messages import I32
from drumline.protocol.shards import Span
from drumline.workers.layers import LocalExperts, MoeLayer

ExpertWeights: TypeAlias = tuple[Tensor, Tensor]
"""One expert: (2 * channels, hidden), the gate's rows first, and (hidden, channels)."""

EMPTY = -1
_LAYER_BITS = 32


def canary_of(number: int, expert: int) -> int:
    """What travels with ``expert`` of MoE layer ``number``, to be known again on arrival."""
    return (number << _LAYER_BITS) + expert


class ExpertLayer:
    """The slots of one MoE layer on this rank.

    ``number``: of the layer among the model's MoE layers; ``layer``: of the layer in the model. ``held``: int32
    (slots,), the expert that is whole in each slot, -1 for none. ``span``: the channels that this rank has of each.
    ``canary``: int64 (slots,), what came with the expert of each slot; ``generation``: of the stage that last changed
    the layer, 0 before the first in an epoch.
    """

    def __init__(self, moe: MoeLayer, number: int, layer: int, held: Sequence[int], span: Span) -> None:
        self.moe = moe
        self.number = number
        self.layer = layer
        self.held: I32 = np.array(held, dtype=np.int32)
        self.span = span
        self.canary = np.array([canary_of(number, expert) for expert in held], dtype=np.int64)
        self.generation = 0
        #: Experts outside of the slots, and their memory. They are numbered on from ``first_spare``.
        self.spares: list[tuple[int, ExpertWeights]] = []
        self.first_spare = len(self.held)

    @property
    def num_slots(self) -> int:
        """Slots of this rank."""
        return len(self.held)

    def weights(self, slot: int) -> ExpertWeights:
        """The memory that ``slot`` computes with."""
        return self.moe.experts.used(slot)

    def source(self, slot: int) -> ExpertWeights:
        """The memory of ``slot``, or of a spare behind the slots."""
        return self.weights(slot) if slot < self.num_slots else self.spares[slot - self.first_spare][1]

    def holds(self, slot: int, expert: int) -> bool:
        """Whether all of ``expert`` stands in ``slot``, or is a spare with that number."""
        if slot < self.num_slots:
            return int(self.held[slot]) == expert
        spare = slot - self.first_spare
        return 0 <= spare < len(self.spares) and self.spares[spare][0] == expert

    def row(self, slot: int) -> ExpertWeights:
        """The slot's own memory."""
        return self.moe.experts.gate_up[slot], self.moe.experts.down[slot]

    def empty(self, slot: int) -> ExpertWeights:
        """The memory of ``slot``, which holds nothing from here on, until :meth:`filled`."""
        self.held[slot] = EMPTY
        return self.weights(slot)

    def filled(self, slot: int, expert: int) -> None:
        """All of ``expert`` stands in ``slot``, which has computed no token yet."""
        self.moe.experts.load[slot] = 0
        self.held[slot] = expert
        self.canary[slot] = canary_of(self.number, expert)

    def write(self, slot: int, expert: int, weights: ExpertWeights) -> None:
        """Put ``expert`` into ``slot``."""
        for target, source in zip(self.empty(slot), weights, strict=True):
            target.copy_(source)
        self.filled(slot, expert)

    def resize(self, num_slots: int) -> None:
        """Have ``num_slots`` slots: the first ones keep what they hold, new ones hold nothing."""
        if num_slots == self.num_slots:
            return
        old, kept = self.moe.experts, min(num_slots, self.num_slots)
        experts = LocalExperts(
            old.gate_up.new_empty(num_slots, *old.gate_up.shape[1:]), old.down.new_empty(num_slots, *old.down.shape[1:])
        )
        for target, source in ((experts.gate_up, old.gate_up), (experts.down, old.down), (experts.load, old.load)):
            target[:kept].copy_(source[:kept])
        held = np.full(num_slots, EMPTY, dtype=np.int32)
        held[:kept] = self.held[:kept]
        canary = np.full(num_slots, EMPTY, dtype=np.int64)
        canary[:kept] = self.canary[:kept]
        self.moe.experts, self.held, self.canary = experts, held, canary

    def recut_room(self, span: Span) -> tuple[Tensor, Tensor]:
        """Undefined memory for the channels ``span`` of every expert: gate_up and down, as in LocalExperts."""
        old, width = self.moe.experts, span[1] - span[0]
        hidden = old.down.shape[1]
        return old.gate_up.new_empty(self.num_slots, 2 * width, hidden), old.down.new_empty(
            self.num_slots, hidden, width
        )

    def replace(self, gate_up: Tensor, down: Tensor, span: Span) -> None:
        """The same experts, cut to the channels ``span``."""
        experts = LocalExperts(gate_up, down)
        experts.load = self.moe.experts.load
        self.moe.experts, self.span = experts, span


def loads(layers: Sequence[ExpertLayer], device: torch.device) -> Tensor:
    """Tokens that each slot has computed, int64 (layers, slots), padded with 0 where layers have fewer slots."""
    width = max((layer.num_slots for layer in layers), default=0)
    total = torch.zeros(len(layers), width, dtype=torch.int64, device=device)
    for row, layer in zip(total, layers, strict=True):
        row[: layer.num_slots] = layer.moe.experts.load
    return total
