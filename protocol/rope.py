"""Rotary position embedding as a config states it, read without torch.

The rules are those of transformers (``modeling_rope_utils``). Its version 5 keeps base and scaling in
``rope_parameters``, 4 in ``rope_theta`` and ``rope_scaling``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from drumline.protocol.configfields import ConfigFields

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RopeScaling(msgspec.Struct, frozen=True):
    """How rotary frequencies are scaled.

    ``kind`` is default, linear (uses ``factor``), llama3 (uses ``factor``, ``low_freq_factor``, ``high_freq_factor``,
    ``original_max_position_embeddings``) or yarn (uses ``factor``, ``original_max_position_embeddings``, ``beta_fast``,
    ``beta_slow`` and ``truncate``: whether the range of channels between the two betas is widened to whole channels).
    ``attention_factor`` multiplies cosines and sines; it is 1 unless ``kind`` is yarn.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


class Rope(NamedTuple):
    """``theta``: the base of the frequencies. ``mscale_all_dim``: 0 when absent; see :func:`softmax_scale`."""

    theta: float
    scaling: RopeScaling
    mscale_all_dim: float = 0.0


def read_rope(fields: ConfigFields, *, default_theta: float, max_positions: int) -> Rope:
    """Base and scaling. What ``rope_scaling`` gives comes first, then ``rope_parameters``, then the keys beside them.

    Raises InvalidConfig for a kind or a value that is not supported.
    """
    outer_theta = fields.number("rope_theta", default=default_theta, above=0.0)
    name = next((n for n in ("rope_scaling", "rope_parameters") if fields.raw(n)), None)
    if name is None:
        return Rope(outer_theta, RopeScaling())
    rope = fields.inside(name)
    for nested in rope.objects():
        raise rope.invalid(nested, rope.raw(nested), "absent (one rotation for all layers, its keys side by side)")
    theta = rope.number("rope_theta", default=outer_theta, above=0.0)
    partial = rope.raw("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise rope.invalid("partial_rotary_factor", partial, "absent or 1.0 (partial rotation is not implemented)")
    kind = rope.raw("rope_type") if rope.raw("rope_type") is not None else rope.raw("type")
    if kind is None and name == "rope_parameters":
        kind = "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        raise rope.invalid("rope_type", kind, "one of " + ", ".join(SUPPORTED_ROPE_TYPES))
    if kind == "default":
        return Rope(theta, RopeScaling())
    factor = rope.number("factor", above=0.0)
    mscale_all_dim = rope.factor("mscale_all_dim")
    if kind == "linear":
        return Rope(theta, RopeScaling(kind="linear", factor=factor), mscale_all_dim)
    # A length that stands beside the rope keys goes before the one within them.
    outside = fields.raw("original_max_position_embeddings") is not None
    original = (fields if outside else rope).integer(
        "original_max_position_embeddings", minimum=1, default=max_positions
    )
    read = _llama3 if kind == "llama3" else _yarn
    if kind == "yarn" and theta <= 1:
        raise rope.invalid("rope_theta", theta, "a number above 1 (yarn divides by its logarithm)")
    return Rope(theta, read(rope, factor, original), mscale_all_dim)


def softmax_scale(rope: Rope, head_dim: int) -> float:
    """What DeepSeek multiplies attention scores by; 0 when it is just ``head_dim ** -0.5``.

    The square of mscale compensates for the lower entropy of a stretched context (``yarn_apply_mscale`` of
    transformers' DeepseekV2Attention, which acts with any scaling, not with yarn alone).
    """
    if rope.scaling.kind == "default" or rope.mscale_all_dim == 0:
        return 0.0
    return float(head_dim**-0.5 * yarn_mscale(rope.scaling.factor, rope.mscale_all_dim) ** 2)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """``0.1 * mscale * ln(factor) + 1``, and 1 for a factor up to 1 (https://arxiv.org/abs/2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(rope: ConfigFields, factor: float, original: int) -> RopeScaling:
    low = rope.number("low_freq_factor", above=0.0)
    high = rope.number("high_freq_factor", above=0.0)
    if high <= low:
        raise rope.invalid("high_freq_factor", high, f"more than low_freq_factor ({low})")
    return RopeScaling("llama3", factor, low, high, original)


def _yarn(rope: ConfigFields, factor: float, original: int) -> RopeScaling:
    beta_fast = rope.number("beta_fast", above=0.0, default=32.0)
    beta_slow = rope.number("beta_slow", above=0.0, default=1.0)
    if beta_fast < beta_slow:
        raise rope.invalid("beta_fast", beta_fast, f"at least beta_slow ({beta_slow})")
    mscale, mscale_all_dim = rope.factor("mscale"), rope.factor("mscale_all_dim")
    if mscale and mscale_all_dim:
        implied = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        implied = yarn_mscale(factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=rope.number("attention_factor", above=0.0, default=implied),
        truncate=rope.boolean("truncate", default=True),
    )
