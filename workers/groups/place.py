"""Where a rank stands in one of an epoch's groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where this rank stands in an epoch's group, and how the group meets.

    ``members``: the global ranks of the group in order, ``rank`` one of them. ``store_host`` and ``store_port`` lead to
    the epoch's TCPStore.
    """

    term: int
    epoch: int
    rank: int
    members: tuple[int, ...]
    store_host: str
    store_port: int
    device: torch.device

    @property
    def position(self) -> int:
        """The index of this rank among the members: its rank within the group."""
        return self.members.index(self.rank)

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return len(self.members)
