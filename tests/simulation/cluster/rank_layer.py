"""The layer whose experts are being moved, as one rank has it: its own part of StageExperts, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drumline.protocol.messages import I32Matrix, StageExperts

NOTHING_STAGED = -1


@dataclass(frozen=True, slots=True)
class Move:
    """One expert on its way from ``source_slot`` of ``source`` to ``slot`` of ``receiver``, counted on each rank."""

    round: int
    expert: int
    source: int
    source_slot: int
    receiver: int
    slot: int

    @property
    def is_local(self) -> bool:
        return self.source == self.receiver


@dataclass(slots=True, eq=False)
class RankLayer:
    """``moves``: all of the layer. ``named``: parts that steps have named. ``under_way``: transfers that have been
    started and are not through. ``parts``: what has come, by own slot. ``retired``: after the commit, by own slot, what
    the slot's row still holds, until the new expert is copied there. ``said``: that all is staged, or dropped."""

    message: StageExperts
    moves: Sequence[Move]
    named: int = 0
    under_way: int = 0
    parts: dict[int, list[int]] = field(default_factory=dict)
    retired: dict[int, int] = field(default_factory=dict)
    said: bool = False
    cancelled: bool = False
    committed: bool = False
    rounds_home: int = 0

    @property
    def num_rounds(self) -> int:
        return len(self.message.rounds) - 1

    @property
    def num_parts(self) -> int:
        return self.num_rounds * self.message.parts

    @property
    def is_through(self) -> bool:
        """Whether nothing is under way of what was, or will be, started."""
        return self.under_way == 0 and (self.cancelled or self.named == self.num_parts)

    @property
    def is_over(self) -> bool:
        """Whether the staging buffers are free."""
        return (self.cancelled and self.said) or (self.committed and self.rounds_home == self.num_rounds)

    def staged(self, slot: int) -> int:
        """The expert that is whole in the staging buffer of ``slot``."""
        came = self.parts.get(slot, [])
        whole = len(came) == self.message.parts and len(set(came)) == 1
        return came[0] if whole else NOTHING_STAGED

    def of_parts(self, first: int, end: int) -> list[tuple[int, Move]]:
        """The parts ``first`` to ``end``, each with the moves of its round."""
        parts = self.message.parts
        return [(number, move) for number in range(first, end) for move in self.moves if move.round == number // parts]


def no_spare(held: I32Matrix) -> I32Matrix:
    """What a rank without whole copies outside of its slots has there: int32 (moe_layers, 0)."""
    return np.zeros((len(held), 0), dtype=np.int32)


def left_over(layer: RankLayer | None, held: I32Matrix) -> I32Matrix:
    """What a rank that leaves its epoch has beside its slots: int32 (moe_layers, spare), whole copies that were not
    committed, or what the commit has retired."""
    if layer is None or layer.is_over:
        return no_spare(held)
    spare = np.full(held.shape, -1, dtype=np.int32)
    for slot in range(held.shape[1]):
        found = layer.retired.get(slot, -1) if layer.committed else layer.staged(slot)
        spare[layer.message.layer, slot] = found
    return spare
