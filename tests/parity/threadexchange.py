"""An expert exchange between threads of one process: the contract, with nothing but memory behind it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

DEADLINE_S = 20.0


class ThreadGroup:
    """What the members of one expert group share. :meth:`member` gives each its exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._posted: list[tuple[Tensor, ...]] = [()] * size

    def member(self, rank: int) -> ThreadExchange:
        return ThreadExchange(self, rank)

    def swap(self, rank: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Post ours and see everybody's, by rank."""
        self._posted[rank] = tuple(tensor.clone() for tensor in tensors)
        self._barrier.wait(DEADLINE_S)
        seen = list(self._posted)
        self._barrier.wait(DEADLINE_S)
        return seen


class ThreadExchange:
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._starts: list[int] = []
        self.exchanges = 0

    def dispatch(self, hidden: Tensor, topk_ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        assert len(hidden) == len(topk_ids) == counts[self._rank]
        seen = self._group.swap(self._rank, hidden, topk_ids)
        assert [len(part[0]) for part in seen] == list(counts)
        self._starts = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
        self.exchanges += 1
        return torch.cat([part[0] for part in seen]), torch.cat([part[1] for part in seen])

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        assert (pair_index.diff() > 0).all()
        seen = self._group.swap(self._rank, outputs, pair_index)
        own = self._starts[self._rank + 1] - self._starts[self._rank]
        top_k = len(owners) // own if own else 0
        first = self._starts[self._rank] * top_k
        home = torch.full((len(owners), outputs.shape[1]), float("nan"))
        for rank, (theirs, index) in enumerate(seen):
            mine = (index >= first) & (index < first + len(owners))
            places = index[mine] - first
            assert (owners[places] == rank).all()
            home[places] = theirs[mine]
        return home
