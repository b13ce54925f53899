"""The collectives that models use, and the group of a rank that has no peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class PendingSend(Protocol):
    """A send that has started; its tensor must not be written to before :meth:`wait` returns."""

    def wait(self) -> None: ...


class PendingRecv(Protocol):
    """A receive that has been posted."""

    def wait(self) -> Tensor: ...


class Group(Protocol):
    """Ranks that compute together, in a fixed order. ``rank_in_group`` is this rank's place among ``ranks`` (global
    ranks). Implemented by :class:`~drumline.workers.groups.GroupCoordinator`, which says what each operation raises.

    Every member calls the same collectives in the same order. Sums are taken in rank order and have the same bits on
    every rank.
    """

    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def rank_in_group(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum of all ranks' tensors, of one shape, as a new tensor."""
        ...

    def all_gather(self, t: Tensor, dim: int = 0) -> Tensor:
        """All ranks' tensors, of one shape, one after the other along ``dim``."""
        ...

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """Rank r brings ``counts[r]`` rows, which may be 0; all of them, in rank order."""
        ...

    def reduce_scatter_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """``t`` (sum(counts), ...): the sum over all ranks of the ``counts[r]`` rows that belong to this rank r."""
        ...

    def gather_columns(self, t: Tensor, widths: Sequence[int], dst: int) -> Tensor | None:
        """Rank r brings (n, widths[r]); all of them side by side at global rank ``dst``, None elsewhere."""
        ...

    def broadcast(self, t: Tensor, src: int) -> Tensor:
        """Global rank ``src``'s tensor, written into ``t`` on the others."""
        ...

    def all_to_all(self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int]) -> None:
        """Send ``source_splits[r]`` rows of ``source`` to each rank r, receive ``output_splits[r]`` rows from it."""
        ...

    def isend(self, t: Tensor, dst: int) -> PendingSend:
        """Start to send ``t`` to global rank ``dst``."""
        ...

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> PendingRecv:
        """Post the receive of a tensor from global rank ``src``."""
        ...


class LoneGroup:
    """The group of one rank: every collective is what it was given."""

    def __init__(self, rank: int = 0) -> None:
        self.ranks = (rank,)
        self.rank_in_group = 0
        self.world_size = 1

    def all_reduce(self, t: Tensor) -> Tensor:
        return t

    def all_gather(self, t: Tensor, dim: int = 0) -> Tensor:
        return t

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        return t

    def reduce_scatter_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        return t

    def gather_columns(self, t: Tensor, widths: Sequence[int], dst: int) -> Tensor | None:
        return t

    def broadcast(self, t: Tensor, src: int) -> Tensor:
        return t

    def all_to_all(self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int]) -> None:
        output.copy_(source)

    def isend(self, t: Tensor, dst: int) -> PendingSend:
        raise ValueError(f"rank {self.ranks[0]} has no peer {dst}")

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> PendingRecv:
        raise ValueError(f"rank {self.ranks[0]} has no peer {src}")
