"""Weights laid out once for oneDNN, which multiplies small batches on CPU up to twice as fast as the plain product.

The operators are private to torch (its inductor uses them for frozen weights). They are tried once against the plain
product; where they are missing or disagree, nothing is packed and everything works as before.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.weights import PACKED_FROM

# The layout is chosen for this batch and serves all.
_BATCH_HINT = 8
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pack_weight(weight: Tensor) -> Tensor | None:
    """``weight`` (out, in) in oneDNN's own layout, for :func:`packed_linear` only; None where packing does not pay."""
    if weight.device.type != "cpu" or weight.dtype not in _TOLERANCE or weight.numel() < PACKED_FROM:
        return None
    return _reorder(weight) if _packing_works(weight.dtype) else None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with a weight from :func:`pack_weight`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _reorder(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
    return packed


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    weight = torch.linspace(-1.0, 1.0, 48 * 32).view(48, 32).to(dtype)
    x = torch.linspace(-1.0, 1.0, 3 * 32).view(3, 32).to(dtype)
    try:
        found = packed_linear(x, _reorder(weight), None)
    except (AttributeError, RuntimeError):
        return False
    tolerance = _TOLERANCE[dtype]
    return found.dtype == dtype and torch.allclose(found, F.linear(x, weight), rtol=tolerance, atol=tolerance)
