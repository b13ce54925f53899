"""Rotary position embedding (https://arxiv.org/abs/2104.09864) with the scalings that configs ask for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import RopeScaling


class RotaryEmbedding:
    """Tables of cosines and sines for every position below ``max_positions``.

    The first half of a head's channels is paired with the second half, as Hugging Face checkpoints have it.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling, max_positions: int, device: torch.device):
        self.half = head_dim // 2
        frequencies = inverse_frequencies(head_dim, theta, scaling)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        # The sign of the rotated half is folded into the table, so that applying it is one product and one sum.
        self._cos = torch.cat([cos, cos], dim=-1).to(device)
        self._sin = torch.cat([-sin, sin], dim=-1).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each float32 (n, 1, head_dim), for int64 ``positions`` (n,)."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._sin.index_select(0, positions).unsqueeze(1)

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate (n, heads, head_dim) by tables from :meth:`at`."""
        cos, sin = tables
        swapped = torch.cat([x[..., self.half :], x[..., : self.half]], dim=-1)
        return (x * cos).addcmul_(swapped, sin)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Angle per position of each channel pair, float32 (head_dim / 2,).

    ``linear`` divides them all by the factor; ``llama3`` only those of long wavelengths, with a smooth passage between
    (the rule published with Llama 3.1). Raises InvalidConfig for another kind.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind != "llama3":
        raise InvalidConfig("rope_type", scaling.kind, "default, linear or llama3")
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    turns = original / wavelengths
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    passage = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, passage)
    return torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, scaled)
