"""The collectives of a group of one rank: copies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class LocalOps:
    """The operations that :class:`drumline.workers.groups.GroupCoordinator` needs, without anybody else."""

    def all_gather(self, out: Tensor, own: Tensor, counts: Sequence[int]) -> None:
        """``out = own``."""
        out.copy_(own)

    def gather(self, out: Tensor | None, own: Tensor, counts: Sequence[int], dst: int) -> None:
        """``out = own``."""
        if out is not None:
            out.copy_(own)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` is what it is."""

    def all_reduce(self, out: Tensor, tensor: Tensor) -> None:
        """``out = tensor``."""
        out.copy_(tensor)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int]) -> None:
        """``out = tensor``."""
        out.copy_(tensor)

    def all_to_all(
        self, output: Tensor, source: Tensor, output_splits: Sequence[int], source_splits: Sequence[int]
    ) -> None:
        """``output = source``."""
        output.copy_(source)

    def barrier(self, timeout_s: float) -> None:
        """Everybody is here."""
