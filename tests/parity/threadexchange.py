"""An expert exchange between threads of one process: the contract, with nothing but memory behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.parity.threadgroup import ThreadMember


class ThreadExchange:
    """Gathers all tokens on all ranks."""

    def __init__(self, member: ThreadMember) -> None:
        self._member = member
        self._starts: list[int] = []
        self.exchanges = 0

    def dispatch(self, hidden: Tensor, slots: Tensor, owners: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        place = self._member.rank_in_group
        assert len(hidden) == len(slots) == counts[place]
        seen = self._member.group.swap(place, hidden, slots)
        assert [len(part[0]) for part in seen] == list(counts)
        self._starts = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
        self.exchanges += 1
        return torch.cat([part[0] for part in seen]), torch.cat([part[1] for part in seen])

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        assert (pair_index.diff() > 0).all()
        place = self._member.rank_in_group
        seen = self._member.group.swap(place, outputs, pair_index)
        own = self._starts[place + 1] - self._starts[place]
        top_k = len(owners) // own if own else 0
        first = self._starts[place] * top_k
        home = torch.full((len(owners), outputs.shape[1]), float("nan"))
        for rank, (theirs, index) in enumerate(seen):
            mine = (index >= first) & (index < first + len(owners))
            places = index[mine] - first
            assert (owners[places] == rank).all()
            home[places] = theirs[mine]
        return home
