"""Who holds the experts of an epoch: its ranks by stage and place, their slots, their hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drumline.protocol.messages import I32

I64 = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """``stages[s][e]``: the global rank of ep rank e in stage s. ``slots``: int32 (ep ranks,), how many each has.
    ``nodes``: int32 (ep ranks,), a number for the host of each. ``layer_stage``: the stage of each MoE layer."""

    stages: tuple[tuple[int, ...], ...]
    slots: I32
    nodes: I32
    layer_stage: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Ep ranks."""
        return len(self.slots)

    @property
    def starts(self) -> I64:
        """int64 (ep ranks + 1,): the first slot of each."""
        return np.concatenate([[0], np.cumsum(self.slots, dtype=np.int64)])

    @property
    def slot_rank(self) -> I64:
        """int64 (slots,): the ep rank that has each."""
        return np.repeat(np.arange(self.num_ranks), self.slots)

    @property
    def holders(self) -> frozenset[int]:
        """The global ranks of all stages that have MoE layers."""
        return frozenset(rank for stage in set(self.layer_stage) for rank in self.stages[stage])

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """The global ranks that hold a layer, by ep rank."""
        return self.stages[self.layer_stage[layer]]

    def layers_of(self, stage: int) -> list[int]:
        """The MoE layers of a stage."""
        return [layer for layer, its in enumerate(self.layer_stage) if its == stage]


def number_hosts(hosts: Sequence[str]) -> I32:
    """int32 (len(hosts),): equal numbers for equal names, from 0 in the order in which they come."""
    known: dict[str, int] = {}
    return np.asarray([known.setdefault(host, len(known)) for host in hosts], dtype=np.int32)
