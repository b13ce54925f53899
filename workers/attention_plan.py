"""From a step's rows to what its attention layers gather."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from drumline.workers.batch import BatchTable, StepRows
from drumline.workers.kv_cache import KVCache
from drumline.workers.layers import AttentionInputs, DecodeRows, PrefillSequence

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Sequences that are gathered together are padded to the longest: at most by half, or by this many blocks.
_SLACK_BLOCKS = 4
# Keys of one gather: small enough to be still in a core's cache when they are multiplied.
_GATHER_BYTES = 1 << 20


def plan_attention(plan: StepRows, batch: BatchTable, cache: KVCache) -> AttentionInputs:
    """Gathers of the decoding rows, in groups of similar length, and one per prefilling row."""
    decodes = _decodes(plan, batch, cache) if plan.num_decode else []
    prefills = [_prefill(plan, batch, i) for i in range(plan.num_decode, len(plan.rows))]
    return AttentionInputs(batch.on_device(plan.slots), tuple(decodes), tuple(prefills))


def _decodes(plan: StepRows, batch: BatchTable, cache: KVCache) -> list[DecodeRows]:
    rows = plan.rows[: plan.num_decode]
    lengths = plan.positions[: plan.num_decode] + 1
    size, kv_heads = batch.block_size, cache.keys[0].shape[0]
    groups = decode_groups(-(-lengths // size), max(_GATHER_BYTES // cache.gather_bytes, 1))
    scratch = cache.scratch(max((end - start) * width for start, end, width in groups))
    decodes = []
    for start, end, width in groups:
        beyond = np.arange(width * size) >= lengths[start:end, None]
        bias = np.where(beyond, np.float32("-inf"), np.float32(0.0))[:, None, :]
        bias = np.tile(bias, (kv_heads, 1, 1))
        blocks = batch.block_table[rows[start:end], :width].reshape(-1)
        room = [part[: kv_heads * len(blocks)].view(kv_heads, len(blocks), size, -1) for part in scratch]
        values = room[1] if len(room) == 2 else None
        decodes.append(DecodeRows(start, end, batch.on_device(blocks), batch.on_device(bias), room[0], values))
    return decodes


def decode_groups(widths: Array, max_blocks: int) -> list[tuple[int, int, int]]:
    """Split rows into runs (start, end, widest) that are gathered together.

    ``widths``: blocks of each row; in any order, but only rows that stand together can share a run, so ascending order
    makes the fewest. A run holds at most ``max_blocks`` padded blocks, or one row.
    """
    groups, start, count = [], 0, len(widths)
    while start < count:
        limit = max(int(widths[start]) * 3 // 2, int(widths[start]) + _SLACK_BLOCKS)
        over = np.flatnonzero(widths[start:] > limit)
        end = start + int(over[0]) if len(over) else count
        widest = int(widths[start:end].max())
        end = min(end, start + max(max_blocks // widest, 1))
        groups.append((start, end, int(widths[start:end].max())))
        start = end
    return groups


def _prefill(plan: StepRows, batch: BatchTable, i: int) -> PrefillSequence:
    end, count = int(plan.ends[i]), int(plan.counts[i])
    context = int(plan.positions[end - 1]) + 1
    mask = None
    if context > count:
        mask = batch.on_device(np.arange(context) <= plan.positions[end - count : end, None])
    blocks = batch.on_device(batch.block_table[plan.rows[i], : -(-context // batch.block_size)])
    return PrefillSequence(end - count, end, context, blocks, mask)
