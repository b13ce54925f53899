"""The tensor groups of an epoch: collectives and messages among ranks, through shared memory, gloo or NCCL."""

from drumline.workers.groups.coordinator import GroupCoordinator, form_group
from drumline.workers.groups.pending import PendingRecv, PendingSend
from drumline.workers.groups.place import GroupPlace
from drumline.workers.groups.watch import (
    COLLECTIVE_DEADLINE_S,
    FORM_DEADLINE_S,
    SLICE_S,
    GroupTimeout,
    PeerLost,
)

__all__ = [
    "COLLECTIVE_DEADLINE_S",
    "FORM_DEADLINE_S",
    "SLICE_S",
    "GroupCoordinator",
    "GroupPlace",
    "GroupTimeout",
    "PeerLost",
    "PendingRecv",
    "PendingSend",
    "form_group",
]
