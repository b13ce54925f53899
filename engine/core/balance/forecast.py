"""What load to plan for, out of several snapshots, and how far off that may be.

The snapshots of each layer are taken for a random walk seen through noise. How much of either there is shows in how
their difference grows with the time between them (a variogram; Cressie, Statistics for Spatial Data, 1993): noise makes
it as large between neighbours as over all the time, a walk makes it grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from drumline.engine.core.balance.grid import Bool
from drumline.engine.core.balance.measure import F64, copies, rank_loads
from drumline.protocol.messages import I32, I32Matrix

CHANCE = 0.05
"""The share of itself by which an expert's load that was seen once may be off."""
NOISE = 0.06
"""Differences between snapshots as this much noise makes are noise, in whichever order they come."""
NEWEST = 0.5
"""Where the newest snapshot would count for more than this, it counts alone."""
SPREAD = 0.25
"""So many standard deviations count. Measured: a quarter serves the next load best, 1 no better than none."""
FALSE_ALARMS = 0.05
"""Plans in which chance alone makes some layer look uneven."""


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """``load``: float64 (layers, experts). ``off``: the standard error of each expert's as a share of it.
    ``swing``: float64 (layers, experts), the standard deviation
    between the snapshots that count. ``shake``: by which share of itself an expert's load differs from snapshot to
    snapshot where that is nothing but noise, and little; else 0."""

    load: F64
    off: float
    swing: F64
    shake: float = 0.0

    @property
    def demand(self) -> F64:
        """What to balance: experts whose load swings count for somewhat more than its mean."""
        return self.load + SPREAD * self.swing


def forecast(snapshots: F64) -> Forecast:
    """From float64 (snapshots, layers, experts), the oldest first, one or more."""
    total = snapshots.sum(axis=2)
    seen = snapshots[(total > 0).any(axis=1)]
    if len(seen) < 2:
        load = seen[0] if len(seen) else snapshots[-1]
        return Forecast(load, CHANCE, np.zeros_like(load))
    # By shares: how much is going on does not matter, and a layer without load says nothing.
    scale = np.where(total > 0, total, 1.0)[(total > 0).any(axis=1)]
    shares = seen / scale[:, :, None]
    weights, noise = _weights(shares)
    off = float(np.sqrt(max(noise, 0.0) * (weights**2).sum()))
    mean = np.einsum("t,tle->le", weights, shares)
    swing = np.sqrt(np.einsum("t,tle->le", weights, (shares - mean) ** 2))
    size = scale.mean(axis=0)[:, None]
    shake = float(np.sqrt(noise)) if 0.0 < noise <= NOISE**2 and len(weights) * weights[-1] < 1.5 else 0.0
    return Forecast(mean * size, off, swing * size, shake)


def _weights(shares: F64) -> tuple[F64, float]:
    """(snapshots,) of each snapshot, and the variance of one, relative to its square."""
    times = len(shares)
    size = float((shares**2).sum()) / times
    apart = [float(((shares[lag:] - shares[:-lag]) ** 2).sum()) / (times - lag) / size for lag in range(1, times)]
    even, newest = np.full(times, 1.0 / times), np.zeros(times)
    newest[-1] = 1.0
    floor = 2 * NOISE**2
    if max(apart) <= floor:
        return even, float(np.mean(apart)) / 2
    walk = _growth(np.asarray(apart)) if times > 2 else max(apart[0] - floor, 0.0)
    noise = max(apart[0] - walk, 0.0) / 2
    # The steady gain of a Kalman filter for a random walk with noise.
    spread = (walk + np.sqrt(walk**2 + 4 * walk * noise)) / 2
    gain = spread / (spread + noise) if spread + noise > 0 else 1.0
    if gain > NEWEST:
        # What noise is left between the walk's steps cannot be told from a few of them.
        return newest, 0.0
    decaying = (1.0 - gain) ** np.arange(times - 1, -1, -1)
    return decaying / decaying.sum(), noise


def _growth(apart: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """By how much the squares of differences grow with each step between snapshots: from neighbours to the far half."""
    lags = np.arange(1, len(apart) + 1)
    pairs = (lags[::-1] * (lags > len(apart) // 2)).astype(np.float64)
    far, lag = (pairs * apart).sum() / pairs.sum(), (pairs * lags).sum() / pairs.sum()
    return max(float((far - apart[0]) / (lag - 1.0)), 0.0)


def uneven(load: F64, off: float, placement: I32Matrix, slot_rank: I32) -> tuple[Bool, F64]:
    """(layers,) each: whether some rank has more load than chance would give it if all were even, and how much of the
    mean chance may give to a rank, where the load of each expert is ``off`` by this share of it. Other arguments as of
    :func:`~drumline.engine.core.balance.measure.rank_loads`."""
    own = np.unique(slot_rank[slot_rank >= 0])
    loads = rank_loads(load, placement, slot_rank)[:, own]
    counts = np.maximum(copies(placement, load.shape[1], slot_rank >= 0), 1.0)
    variance = rank_loads((off * load) ** 2 / counts, placement, slot_rank)[:, own]
    mean = loads.mean(axis=1)
    limit = NormalDist().inv_cdf(1.0 - FALSE_ALARMS / max(loads.size, 2))
    slack = np.maximum(limit * np.sqrt(variance), 1e-6 * mean[:, None])
    chance = np.divide(limit * np.sqrt(variance.mean(axis=1)), mean, out=np.zeros_like(mean), where=mean > 0)
    return (loads - mean[:, None] > slack).any(axis=1), chance
