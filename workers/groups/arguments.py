"""What the operations of a group ask of their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as flat uint8, without a copy."""
    return tensor.view(-1).view(torch.uint8)


def plain(counts: Sequence[int]) -> list[int]:
    """Counts of any integer type as Python's own, whose products do not wrap around."""
    return [int(count) for count in counts]


def check_dim(tensor: Tensor, dim: int) -> int:
    """``dim`` counted from the front. Raises ProtocolError when the tensor has no such dimension."""
    if not -tensor.dim() <= dim < tensor.dim():
        valid = f"-{tensor.dim()} to {tensor.dim() - 1}" if tensor.dim() else "a tensor with dimensions"
        raise ProtocolError(f"dim: found {dim}; valid: {valid}")
    return dim % tensor.dim()


def count_rows(tensor: Tensor) -> int:
    """The length of the first dimension. Raises ProtocolError when there is none."""
    if tensor.dim() == 0:
        raise ProtocolError("found a tensor without dimensions; valid: rows along dimension 0")
    return tensor.shape[0]


def summable(tensor: Tensor) -> Tensor:
    """``tensor``. Raises ProtocolError for a dtype that has no sum."""
    if tensor.dtype is torch.bool:
        raise ProtocolError("dtype: found torch.bool; valid: a number")
    return tensor


def concatenate(gathered: Tensor, tensor: Tensor, dim: int, size: int) -> Tensor:
    """The flat tensors of ``size`` ranks, shaped like ``tensor``, along ``dim``; contiguous."""
    parts = gathered.view(size, *tensor.shape)
    if dim == 0:
        return parts.view(size * tensor.shape[0], *tensor.shape[1:])
    return torch.cat(parts.unbind(0), dim)
