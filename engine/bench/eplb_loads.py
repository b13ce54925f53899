"""Expert loads made by a seeded generator, for who has recorded none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from drumline.engine.expert_records import MAX_NUMBERS
from drumline.protocol.errors import InvalidConfig

F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

TOKENS_PER_EXPERT = 4096
"""What the mean expert gets in one time: how much chance there is in a count follows from it."""
SIGMA, EXPONENT, DRIFT, NOISE = 1.0, 1.2, 0.3, 0.05


def synthetic_loads(kind: str, times: int, layers: int, experts: int, seed: int = 0) -> F64:
    """Tokens of each expert, float64 (times, layers, experts), whole numbers; the same for the same arguments.

    ``lognormal``: popularity with sigma 1, fixed; a time counts some 4,096 tokens per expert of it. ``zipf``: the same
    with popularity as the rank to the power of -1.2, in an order of its own for each layer. ``drift``: lognormal, and
    from time to time 30 % of the load goes over to experts drawn anew. ``noise``: lognormal, each count off by 5 % of
    itself, independently (standard deviation). Raises InvalidConfig.
    """
    if kind not in SYNTHETIC:
        raise InvalidConfig("synthetic", kind, "one of " + ", ".join(SYNTHETIC))
    if min(times, layers, experts) < 1 or times * layers * experts > MAX_NUMBERS:
        found = f"{times} times, {layers} layers, {experts} experts"
        raise InvalidConfig("times", found, f"each from 1, at most {MAX_NUMBERS:,} numbers in all")
    if seed < 0:
        raise InvalidConfig("seed", seed, "a whole number from 0")
    random = np.random.default_rng(seed)
    return _KINDS[kind](random, times, layers, experts)


def _lognormal(random: np.random.Generator, layers: int, experts: int) -> F64:
    return _shares(random.lognormal(0.0, SIGMA, (layers, experts)))


def _shares(popularity: F64) -> F64:
    shares: F64 = popularity / popularity.sum(axis=-1, keepdims=True)
    return shares


def _counted(random: np.random.Generator, shares: F64) -> F64:
    tokens: F64 = random.poisson(shares * (TOKENS_PER_EXPERT * shares.shape[-1])).astype(np.float64)
    return tokens


def _fixed(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    shares = _lognormal(random, layers, experts)
    return _counted(random, np.broadcast_to(shares, (times, layers, experts)))


def _zipf(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    popularity = np.arange(1.0, experts + 1) ** -EXPONENT
    shares = _shares(np.stack([random.permutation(popularity) for _ in range(layers)]))
    return _counted(random, np.broadcast_to(shares, (times, layers, experts)))


def _drift(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    shares = [_lognormal(random, layers, experts)]
    for _ in range(1, times):
        shares.append((1 - DRIFT) * shares[-1] + DRIFT * _lognormal(random, layers, experts))
    return _counted(random, np.stack(shares))


def _noise(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    mean = _lognormal(random, layers, experts) * (TOKENS_PER_EXPERT * experts)
    noisy = mean * (1.0 + NOISE * random.standard_normal((times, layers, experts)))
    return np.rint(np.maximum(noisy, 0.0))


_KINDS: dict[str, Callable[[np.random.Generator, int, int, int], F64]] = {
    "lognormal": _fixed,
    "zipf": _zipf,
    "drift": _drift,
    "noise": _noise,
}
SYNTHETIC = tuple(_KINDS)
