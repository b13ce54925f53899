"""The collectives of ranks that are threads of one process: the contract of ``Group``, with nothing but memory
behind it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEADLINE_S = 20.0


class ThreadGroup:
    """What the members of one group share. :meth:`member` gives each global rank its own view."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._barrier = threading.Barrier(len(ranks))
        self._posted: list[tuple[Tensor, ...]] = [()] * len(ranks)
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = {
            (source, target): queue.Queue() for source in ranks for target in ranks
        }

    def member(self, rank: int) -> ThreadMember:
        return ThreadMember(self, rank)

    def swap(self, place: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Post ours and see everybody's, by place."""
        self._posted[place] = tuple(tensor.clone() for tensor in tensors)
        self._barrier.wait(DEADLINE_S)
        seen = list(self._posted)
        self._barrier.wait(DEADLINE_S)
        return seen

    def abort(self) -> None:
        self._barrier.abort()


@dataclass
class _Sent:
    def wait(self) -> None:
        return

    def look(self, slice_s: float) -> bool:
        return True


@dataclass
class _Received:
    box: queue.Queue[Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    result: Tensor | None = None

    def wait(self) -> Tensor:
        return self._take(self.box.get(timeout=DEADLINE_S))

    def look(self, slice_s: float) -> bool:
        with contextlib.suppress(queue.Empty):
            self._take(self.box.get_nowait())
        return self.result is not None

    def _take(self, tensor: Tensor) -> Tensor:
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)
        self.result = tensor
        return tensor


@dataclass
class ThreadMember:
    """One rank's view; counts the collectives that it has entered."""

    group: ThreadGroup
    rank: int
    collectives: int = field(default=0)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.group.ranks

    @property
    def rank_in_group(self) -> int:
        return self.group.ranks.index(self.rank)

    @property
    def world_size(self) -> int:
        return len(self.group.ranks)

    def _swap(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        self.collectives += 1
        return self.group.swap(self.rank_in_group, *tensors)

    def all_reduce(self, t: Tensor) -> Tensor:
        seen = [part for (part,) in self._swap(t)]
        assert len({part.shape for part in seen}) == 1
        total = seen[0].float().clone() if t.dtype == torch.bfloat16 else seen[0].clone()
        for part in seen[1:]:
            total += part
        return total.to(t.dtype)

    def all_gather(self, t: Tensor, dim: int = 0) -> Tensor:
        return torch.cat([part for (part,) in self._swap(t)], dim)

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        seen = [part for (part,) in self._swap(t)]
        assert [len(part) for part in seen] == list(counts)
        return torch.cat(seen)

    def reduce_scatter_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(t) == sum(counts)
        start = sum(counts[: self.rank_in_group])
        return self.all_reduce(t)[start : start + counts[self.rank_in_group]]

    def gather_columns(self, t: Tensor, widths: Sequence[int], dst: int) -> Tensor | None:
        seen = [part for (part,) in self._swap(t)]
        assert [part.shape[1] for part in seen] == list(widths)
        return torch.cat(seen, 1) if dst == self.rank else None

    def broadcast(self, t: Tensor, src: int) -> Tensor:
        seen = self._swap(t)
        return t.copy_(seen[self.ranks.index(src)][0])

    def all_to_all(self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int]) -> None:
        assert (len(output), len(source)) == (sum(output_splits), sum(source_splits))
        seen = self._swap(source, torch.tensor(source_splits))
        place, parts = self.rank_in_group, []
        for rows, splits in seen:
            parts.append(rows.split_with_sizes(splits.tolist())[place])
        assert [len(part) for part in parts] == output_splits
        output.copy_(torch.cat(parts))

    def has_room(self, dst: int) -> bool:
        return True

    def isend(self, t: Tensor, dst: int) -> _Sent:
        self.group.mail[self.rank, dst].put(t.clone())
        return _Sent()

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> _Received:
        return _Received(self.group.mail[src, self.rank], tuple(shape), dtype)
