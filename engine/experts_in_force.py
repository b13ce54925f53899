"""Which experts stand where in a running engine."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.coordination import Coordination
from drumline.engine.core.refit import ranks_of_stage
from drumline.protocol.messages import I32, NO_NUMBERS, I32Matrix


def experts_in_force(coordination: Coordination) -> tuple[I32Matrix | None, I32]:
    """The placement, int32 (moe_layers, slots), and int32 (ep ranks,), how many slots each ep rank of the whole layout
    has, 0 for one that does not compute; None where no epoch has said another than the first."""
    group = coordination.membership.groups[0]  # all replicas of a MoE model are one lockstep group
    refit, layout, balance = group.refit, coordination.config.layout, coordination.balance
    if refit is None or not len(refit.slots):
        return None, NO_NUMBERS
    placement = refit.placement
    if balance is not None and balance.placement.shape == placement.shape:
        placement = balance.placement
    slots = np.zeros(layout.ep_size, dtype=np.int32)
    for rank, count in zip(ranks_of_stage(layout, group.members)[0], refit.slots.tolist(), strict=True):
        slots[layout.ep_rank(rank)] = count
    return placement, slots
