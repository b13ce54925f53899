"""Sampling noise that depends on nothing but the sequence and the position.

``u(seed, index, position, token)`` is a chain of splitmix64 finalisers (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", OOPSLA 2014), so a token comes out the same whatever rank computes it and whatever rows
stand beside it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Unsigned: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 of the same 64 bits; torch has no arithmetic on uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: Unsigned) -> Unsigned:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


def row_keys(seed: Array, index: Array, position: Array) -> Unsigned:
    """One uint64 key per row from uint64 ``seed``, int64 ``index`` and ``position``."""
    golden = np.uint64(_GOLDEN)
    with np.errstate(over="ignore"):
        key = _mix(seed.astype(np.uint64) + golden)
        key = _mix((key ^ index.astype(np.uint64)) + golden)
        return _mix((key ^ position.astype(np.uint64)) + golden)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's shift of int64 copies the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def uniform_noise(seed: Array, index: Array, position: Array, vocab_size: int, device: torch.device) -> Tensor:
    """float32 (rows, vocab_size), uniform in (0, 1) and fine-grained near 0."""
    keys = torch.from_numpy(row_keys(seed, index, position).view(np.int64)).to(device)
    value = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device).mul_(_signed(_GOLDEN)) + keys.unsqueeze(1)
    value = value.bitwise_xor_(_shift_right(value, 30)).mul_(_signed(_MIX_1))
    value = value.bitwise_xor_(_shift_right(value, 27)).mul_(_signed(_MIX_2))
    value = value.bitwise_xor_(_shift_right(value, 31))
    # 53 bits, so that float32 keeps its relative precision for small numbers; 1.0 itself is kept out.
    uniform = _shift_right(value, 11).to(torch.float32).add_(0.5).mul_(2.0**-53)
    return uniform.clamp_(max=1.0 - 2.0**-24)


def gumbel_noise(seed: Array, index: Array, position: Array, vocab_size: int, device: torch.device) -> Tensor:
    """float32 (rows, vocab_size) of the standard Gumbel distribution: the argmax of scores + noise is a draw from
    softmax(scores). Large values, which decide, come from small uniforms, where float32 is finest."""
    return uniform_noise(seed, index, position, vocab_size, device).neg_().log1p_().neg_().log_().neg_()
