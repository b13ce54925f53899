"""How even a placement makes the load of ranks."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def copies(placement: Numbers, num_experts: int, counts: Numbers | None = None) -> F64:
    """float64 (layers, experts): how many slots hold each expert. ``counts``: bool (slots,), those that count."""
    layers = len(placement)
    held = placement >= 0 if counts is None else (placement >= 0) & counts
    index = (np.arange(layers)[:, None] * num_experts + placement)[held]
    return np.bincount(index, minlength=layers * num_experts).reshape(layers, num_experts).astype(np.float64)


def rank_loads(load: Numbers, placement: Numbers, slot_rank: Numbers) -> F64:
    """float64 (layers, ranks): the load of each rank when the copies of an expert share it evenly.

    ``load`` (layers, experts); ``placement`` (layers, slots), -1 for an empty slot; ``slot_rank`` (slots,), whose each
    slot is, -1 for one that does not count. An expert without a copy counts nowhere.
    """
    layers, experts = load.shape
    ranks = int(slot_rank.max(initial=-1)) + 1
    counted = slot_rank >= 0
    each = load / np.maximum(copies(placement, experts, counted), 1.0)
    held = (placement >= 0) & counted
    of_slot = np.take_along_axis(each, np.maximum(placement, 0), axis=1)[held]
    index = (np.arange(layers)[:, None] * ranks + slot_rank)[held]
    return np.bincount(index, of_slot, layers * ranks).astype(np.float64).reshape(layers, ranks)


def balancedness(load: Numbers, placement: Numbers, slot_rank: Numbers) -> F64:
    """float64 (layers,): the load of the mean rank over that of the busiest, in (0, 1], 1.0 without load.

    Arguments as of :func:`rank_loads`; only ranks that have slots count.
    """
    ranks = rank_loads(load, placement, slot_rank)[:, np.unique(slot_rank[slot_rank >= 0])]
    if not ranks.shape[1]:
        return np.ones(len(load))
    most = ranks.max(axis=1)
    even: F64 = np.divide(ranks.mean(axis=1), most, out=np.ones(len(load)), where=most > 0)
    return even
