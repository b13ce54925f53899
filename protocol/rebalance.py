"""The published balancing algorithm: experts to slots, from their load alone. numpy only, all layers at once.

After DeepSeek's expert parallelism load balancer (github.com/deepseek-ai/EPLB), of which it gives the same answers.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from drumline.protocol.errors import InvalidConfig

F32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
I64: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

LARGEST = 1e38


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[I64, I64, I64]:
    """Give the busiest experts more copies and pack the copies evenly, the same number on each GPU.

    Where ``num_groups`` divides by ``num_nodes``, groups are packed to nodes first and copied within them
    (hierarchical); else groups and nodes do not matter (global). An expert may have two copies on a GPU.

    Args:
        weight: (layers, experts), the load of each.
        num_replicas: slots of a layer, as many on each GPU.
        num_groups: groups of experts, neighbours in number.
        num_nodes: hosts, with as many GPUs each.
        num_gpus: of all nodes.

    Returns:
        Three int64 arrays: ``physical_to_logical_map`` (layers, num_replicas), the expert in each slot, slots GPU by
        GPU; ``logical_to_physical_map`` (layers, experts, num_replicas - experts + 1), the slots of each expert, -1
        where there are no more; ``expert_count`` (layers, experts), how many.

    Raises InvalidConfig, a ValueError, for sizes that do not divide and loads that are no numbers, naming the argument.
    """
    load = _load(weight)
    num_replicas, num_groups = _size("num_replicas", num_replicas), _size("num_groups", num_groups)
    num_nodes, num_gpus = _size("num_nodes", num_nodes), _size("num_gpus", num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check(load, num_replicas, num_groups, num_nodes, num_gpus)
    physical, nth, count = _hierarchical(load, num_replicas, num_groups, num_nodes, num_gpus)
    layers, experts = load.shape
    logical = np.full((layers, experts, num_replicas - experts + 1), -1, dtype=np.int64)
    logical[np.arange(layers)[:, None], physical, nth] = np.arange(num_replicas)
    return physical, logical, count


def _load(weight: ArrayLike) -> F32:
    """float32 (layers, experts)."""
    try:
        found = np.asarray(weight)
    except (ValueError, TypeError) as error:
        raise InvalidConfig("weight", type(weight).__name__, "(layers, experts)") from error
    if found.ndim != 2 or not found.size:
        raise InvalidConfig("weight", f"an array {found.shape}", "(layers, experts)")
    if found.dtype.kind not in "biuf":
        raise InvalidConfig("weight", f"{found.dtype}", "finite numbers from 0")
    wrong = ~np.isfinite(found) | (found < 0)
    if wrong.any():
        raise InvalidConfig("weight", "numbers below 0 or not finite", "finite numbers from 0")
    # Sums of a layer are taken in float32, and have to be numbers there.
    if found.astype(np.float64).sum(axis=1).max() > LARGEST:
        raise InvalidConfig("weight", f"{found.max()}", f"numbers of which a layer has {LARGEST:g} at most in all")
    return found.astype(np.float32)


def _size(name: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise InvalidConfig(name, size, "a whole number from 1")
    return int(size)


def _check(load: F32, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    experts = load.shape[1]
    if num_replicas < experts:
        raise InvalidConfig("num_replicas", num_replicas, f"{experts} or more, one slot for each expert")
    if experts % num_groups:
        raise InvalidConfig("num_groups", num_groups, f"a divisor of the {experts} experts")
    if num_gpus % num_nodes:
        raise InvalidConfig("num_gpus", num_gpus, f"a multiple of the {num_nodes} nodes")
    if num_replicas % num_gpus:
        raise InvalidConfig("num_replicas", num_replicas, f"a multiple of the {num_gpus} GPUs")


def _pack(weight: F32, num_packs: int) -> tuple[I64, I64]:
    """Heaviest first, each item (rows, items) to the lightest pack that is not full. Its pack, and its place there."""
    rows, items = weight.shape
    size = items // num_packs
    pack, place = np.zeros((2, rows, items), dtype=np.int64)
    if size == 1:
        pack[:] = np.arange(items)
        return pack, place
    row = np.arange(rows)
    total = np.zeros((rows, num_packs), dtype=np.float32)
    filled = np.zeros((rows, num_packs), dtype=np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        lightest = np.where(filled < size, total, np.inf).argmin(axis=1)
        pack[row, item] = lightest
        place[row, item] = filled[row, lightest]
        filled[row, lightest] += 1
        total[row, lightest] += weight[row, item]
    return pack, place


def _replicate(weight: F32, num_slots: int) -> tuple[I64, I64, I64]:
    """One copy after the other to the item (rows, items) with most load for each. The item of each slot, which copy of
    it that is, and how many each item has."""
    rows, items = weight.shape
    row = np.arange(rows)
    item_of = np.tile(np.arange(num_slots), (rows, 1))
    nth = np.zeros((rows, num_slots), dtype=np.int64)
    count = np.ones((rows, items), dtype=np.int64)
    each = weight.copy()
    for slot in range(items, num_slots):
        busiest = each.argmax(axis=1)
        item_of[:, slot] = busiest
        nth[:, slot] = count[row, busiest]
        count[row, busiest] += 1
        each[row, busiest] = weight[row, busiest] / count[row, busiest].astype(np.float32)
    return item_of, nth, count


def _hierarchical(load: F32, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> tuple[I64, I64, I64]:
    layers, experts = load.shape
    group_size, per_node = experts // num_groups, experts // num_nodes
    # Groups to nodes. ``regrouped`` numbers the experts node by node.
    node, place = _pack(load.reshape(layers, num_groups, group_size).sum(axis=2), num_nodes)
    first = (node * (num_groups // num_nodes) + place) * group_size
    regrouped = (first[:, :, None] + np.arange(group_size)).reshape(layers, experts)
    expert = _inverse(regrouped)
    # Copies, a row for each node.
    rows: F32 = np.take_along_axis(load, expert, axis=1).reshape(layers * num_nodes, per_node)
    item_of, nth, count = _replicate(rows, num_replicas // num_nodes)
    # Copies to the GPUs of their node.
    each: F32 = np.take_along_axis(np.divide(rows, count.astype(np.float32)), item_of, axis=1)
    gpu, place = _pack(each, num_gpus // num_nodes)
    order = _inverse(gpu * (num_replicas // num_gpus) + place)
    item = np.take_along_axis(item_of, order, axis=1).reshape(layers, num_nodes, -1)
    item += np.arange(num_nodes)[:, None] * per_node
    physical = np.take_along_axis(expert, item.reshape(layers, -1), axis=1)
    copy = np.take_along_axis(nth, order, axis=1).reshape(layers, -1)
    return physical, copy, np.take_along_axis(count.reshape(layers, -1), regrouped, axis=1)


def _inverse(permutation: I64) -> I64:
    """Of each row."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None], axis=1)
    return inverse
