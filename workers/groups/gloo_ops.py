"""Collectives over gloo's sockets.

Tensors are flat and contiguous, on the CPU. Sums are made here, in rank order, from what an all-to-all or an all-gather
brings: that gives every rank the same bits, and gloo's own sums take longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drumline.workers.groups.sockets import Sockets
from drumline.workers.groups.sums import add_in_order, even_counts

# From here on each rank of three or more adds up its share and fetches the others', instead of fetching everything.
SPLIT_SUM_BYTES = 128 << 10


class GlooOps:
    """The operations that :class:`drumline.workers.groups.GroupCoordinator` needs, over a process group of gloo."""

    def __init__(self, sockets: Sockets, position: int, size: int) -> None:
        self._sockets = sockets
        self._position = position
        self._size = size

    def all_gather(self, out: Tensor, own: Tensor, counts: Sequence[int]) -> None:
        """``out`` (sum(counts),) becomes the concatenation of every rank's ``own`` (counts[position],)."""
        if all(count == counts[0] for count in counts):
            self._sockets.run(self._group()._allgather_base(out, own))
        else:
            self.all_to_all(out, own.repeat(self._size), counts, [len(own)] * self._size)

    def gather(self, out: Tensor | None, own: Tensor, counts: Sequence[int], dst: int) -> None:
        """As :meth:`all_gather`, at position ``dst`` alone."""
        to_dst = [0] * self._size
        to_dst[dst] = len(own)
        received = [0] * self._size if out is None else counts
        self.all_to_all(own.new_empty(0) if out is None else out, own, received, to_dst)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` becomes that of position ``src``."""
        self._sockets.run(self._group().broadcast(tensor, src))

    def all_reduce(self, out: Tensor, tensor: Tensor) -> None:
        """``out`` becomes the sum of every rank's ``tensor``, added in rank order."""
        if self._size > 2 and tensor.nbytes >= SPLIT_SUM_BYTES:
            counts = even_counts(len(tensor), self._size)
            share = tensor.new_empty(counts[self._position])
            self.reduce_scatter(share, tensor, counts)
            self._gather_bytes(out, share, counts)
            return
        everyone = tensor.new_empty(self._size * len(tensor))
        self._gather_bytes(everyone, tensor, [len(tensor)] * self._size)
        add_in_order(everyone.view(self._size, -1).unbind(0), out)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int]) -> None:
        """``tensor`` (sum(counts),) is a segment for each rank; ``out`` becomes the sum of those for this one."""
        own, item = counts[self._position], tensor.element_size()
        arrived = tensor.new_empty(self._size * own)
        splits = [count * item for count in counts]
        self.all_to_all(arrived.view(torch.uint8), tensor.view(torch.uint8), [own * item] * self._size, splits)
        if own:
            add_in_order(arrived.view(self._size, own).unbind(0), out)

    def all_to_all(
        self, output: Tensor, source: Tensor, output_splits: Sequence[int], source_splits: Sequence[int]
    ) -> None:
        """Segment r of ``source`` goes to position r, segment r of ``output`` comes from there."""
        self._sockets.run(self._group().alltoall_base(output, source, list(output_splits), list(source_splits)))

    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called this. The GroupTimeout after ``timeout_s`` names those that have not."""
        self._sockets.barrier(timeout_s)

    def _gather_bytes(self, out: Tensor, own: Tensor, counts: Sequence[int]) -> None:
        # As bytes, since gloo does not know every dtype.
        item = own.element_size()
        self.all_gather(out.view(torch.uint8), own.view(torch.uint8), [count * item for count in counts])

    def _group(self) -> Any:
        return self._sockets.group()
