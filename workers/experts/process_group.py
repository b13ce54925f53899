"""What a rearrangement needs of a group, and torch's own process groups as such a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drumline.protocol.errors import InvalidConfig
from drumline.workers.collectives import PendingRecv, PendingSend
from drumline.workers.groups import COLLECTIVE_DEADLINE_S


class ExpertGroup(Protocol):
    """Ranks that hold experts, in order; what :class:`~drumline.workers.collectives.Group` has, too."""

    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def rank_in_group(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """Rank r brings ``counts[r]`` rows, which may be 0; all of them, in rank order."""
        ...

    def isend(self, t: Tensor, dst: int) -> PendingSend:
        """Start to send ``t`` to rank ``dst`` of ``ranks``."""
        ...

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> PendingRecv:
        """Post the receive of a tensor from rank ``src`` of ``ranks``."""
        ...


AnyGroup: TypeAlias = ExpertGroup | ProcessGroup


@dataclass(frozen=True, slots=True)
class _Send:
    work: Any
    tensor: Tensor

    def wait(self) -> None:
        self.work.wait(timedelta(seconds=COLLECTIVE_DEADLINE_S))


@dataclass(frozen=True, slots=True)
class _Receive:
    work: Any
    tensor: Tensor

    def wait(self) -> Tensor:
        self.work.wait(timedelta(seconds=COLLECTIVE_DEADLINE_S))
        return self.tensor


class TorchGroup:
    """A ``torch.distributed.ProcessGroup``, registered or not, whose ranks are numbered from 0 here.

    ``device``: where received tensors are to lie. What fails, or does not come within the deadline of a collective, is
    torch's own RuntimeError.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.ranks = tuple(range(group.size()))
        self.rank_in_group = group.rank()
        self.world_size = group.size()
        self._group: Any = group
        self._device = device

    def all_gather_rows(self, t: Tensor, counts: Sequence[int]) -> Tensor:
        """See :class:`ExpertGroup`."""
        most = max(counts)
        own = t.new_zeros(most, *t.shape[1:])
        own[: len(t)] = t
        if not most:
            return own
        parts = [torch.empty_like(own) for _ in counts]
        self._group.allgather([parts], [own]).wait(timedelta(seconds=COLLECTIVE_DEADLINE_S))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def isend(self, t: Tensor, dst: int) -> _Send:
        """See :class:`ExpertGroup`."""
        flat = t.contiguous().view(-1)
        return _Send(self._group.send([flat], dst, 0), flat)

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> _Receive:
        """See :class:`ExpertGroup`."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return _Receive(self._group.recv([tensor.view(-1)], src, 0), tensor)


def expert_group(group: AnyGroup, device: torch.device) -> ExpertGroup:
    """``group`` itself, or what makes one of a torch process group. Raises InvalidConfig for what is neither."""
    if isinstance(group, ProcessGroup):
        return TorchGroup(group, device)
    if not all(hasattr(group, name) for name in ("ranks", "rank_in_group", "world_size", "isend", "irecv")):
        valid = "a group of drumline.workers.groups or a torch.distributed.ProcessGroup"
        raise InvalidConfig("ep_group", type(group).__name__, valid)
    return group
