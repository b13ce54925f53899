"""Rotary position embedding (https://arxiv.org/abs/2104.09864) with the scalings that configs ask for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.modelspec import RopeScaling


class RotaryEmbedding:
    """Tables of cosines and sines for every position below ``max_positions``.

    The first half of the ``rotary_dim`` channels is paired with the second half, as most Hugging Face checkpoints have
    it; ``interleaved``: each even channel with the one after it. What is rotated then comes back as first and second
    halves, queries and keys alike, which their products do not notice.
    """

    def __init__(
        self,
        rotary_dim: int,
        theta: float,
        scaling: RopeScaling,
        max_positions: int,
        device: torch.device,
        *,
        interleaved: bool = False,
    ):
        self.half = rotary_dim // 2
        self._interleaved = interleaved
        frequencies = inverse_frequencies(rotary_dim, theta, scaling)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos() * scaling.attention_factor, angles.sin() * scaling.attention_factor
        # The sign of the rotated half is folded into the table, so that applying it is one product and one sum.
        self._cos = torch.cat([cos, cos], dim=-1).to(device)
        self._sin = torch.cat([-sin, sin], dim=-1).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each float32 (n, 1, rotary_dim), for int64 ``positions`` (n,)."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._sin.index_select(0, positions).unsqueeze(1)

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate (n, heads, rotary_dim) by tables from :meth:`at`; computed in float32."""
        cos, sin = tables
        first, second = (x[..., ::2], x[..., 1::2]) if self._interleaved else (x[..., : self.half], x[..., self.half :])
        if self._interleaved:
            x = torch.cat([first, second], dim=-1)
        swapped = torch.cat([second, first], dim=-1)
        return (x * cos).addcmul_(swapped, sin).to(x.dtype)


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Angle per position of each channel pair, float32 (rotary_dim / 2,).

    ``linear`` divides them all by the factor; ``llama3`` (the rule published with Llama 3.1) and ``yarn``
    (https://arxiv.org/abs/2309.00071) only those of long wavelengths, with a smooth passage between. Raises
    InvalidConfig for another kind.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(frequencies, rotary_dim, theta, scaling)
    if scaling.kind != "llama3":
        raise InvalidConfig("rope_type", scaling.kind, "default, linear, llama3 or yarn")
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    turns = original / wavelengths
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    passage = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, passage)
    return torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, scaled)


def _yarn(frequencies: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    def channel(turns: float) -> float:
        """The channel pair that turns so often over the original context."""
        length = scaling.original_max_position_embeddings
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
