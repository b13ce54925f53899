"""Which state of each layer to have, when the best of all of them cost more than there is."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.balance.grid import F32, Bool, Index

STEPS = 24
"""Halvings of the price of a slot."""


def spend(worth: F32, cost: Index, allowed: Bool, most: int) -> Index:
    """(layers,): the index of a state for each layer, so that their worth is large and their cost ``most`` or less.

    ``worth``, ``cost`` and ``allowed``: (layers, states); the first state costs nothing and is allowed. A price for a
    unit of cost is found at which the layers choose no more than there is (Lagrange; Everett, 1963); what is left goes
    to those that get most for it.
    """
    worth = np.where(allowed, worth, np.float32(-np.inf))
    low, high = 1e-7, 1.0
    chosen = _at_price(worth, cost, low)
    if _total(cost, chosen) <= most:
        return chosen
    for _ in range(STEPS):
        price = (low * high) ** 0.5
        if _total(cost, _at_price(worth, cost, price)) <= most:
            high = price
        else:
            low = price
    chosen = _at_price(worth, cost, high)
    if _total(cost, chosen) > most:
        chosen = np.zeros_like(chosen)
    return _fill(worth, cost, chosen, most)


def _at_price(worth: F32, cost: Index, price: float) -> Index:
    best: Index = (worth - np.float32(price) * cost).argmax(axis=1)
    return best


def _total(cost: Index, chosen: Index) -> int:
    return int(cost[np.arange(len(cost)), chosen].sum())


def _fill(worth: F32, cost: Index, chosen: Index, most: int) -> Index:
    """Spend what is left on better states, the layers that gain most first."""
    layers = np.arange(len(cost))
    left = most - _total(cost, chosen)
    gain = worth.max(axis=1) - worth[layers, chosen]
    for layer in np.argsort(-gain, kind="stable").tolist():
        now = chosen[layer]
        can = cost[layer] - cost[layer, now] <= left
        better = int(np.where(can, worth[layer], -np.inf).argmax())
        if worth[layer, better] > worth[layer, now]:
            left -= int(cost[layer, better] - cost[layer, now])
            chosen[layer] = better
    return chosen
