"""The rows of one lockstep group as numpy columns, and the token history beside the KV blocks.

A row of the group is ``replica * max_num_seqs + row of the replica``; on the wire only the latter is used. A worker
keeps the same rows on its device, so a step needs to say only what changes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from drumline.engine.core.block_pool import I32, I64, BlockPool
from drumline.engine.core.request import Sequence

FREE, PREFILL, DECODE, DRAIN, DETACHED, LEFT = range(6)
"""Row states. DRAIN: its last token by length is in flight. DETACHED: its blocks are gone, but tokens in flight still
count. LEFT: its sequence has ended or been taken out, and what is in flight for it is discarded."""

STOP_COLUMNS = 8


class BatchTable:
    """Columns by row. ``length`` counts planned tokens, ``known`` those that a worker has told; ``filled`` counts KV
    entries written by acknowledged steps; ``last_step`` is the last planned step that computes the row, ``lane``
    the lane in whose steps it computes.

    ``blocks`` (rows, blocks per row) int32 holds block numbers of the group, 0 where there is none; its memory and
    that of ``history`` (blocks, block_size) int32 is touched only where rows have been. A row's token at position p
    stands in ``history[blocks[row, p // block_size], p % block_size]``, and ``tail`` holds its newest one, which may
    not have a block yet.
    """

    def __init__(
        self,
        replicas: int,
        rows_per_replica: int,
        max_model_len: int,
        block_size: int,
        pool: BlockPool,
        lanes: int = 1,
    ) -> None:
        rows = replicas * rows_per_replica
        self.replicas = replicas
        self.rows_per_replica = rows_per_replica
        self.block_size = block_size
        self.lanes = lanes
        self.status = np.zeros(rows, dtype=np.uint8)
        self.length = np.zeros(rows, dtype=np.int32)
        self.known = np.zeros(rows, dtype=np.int32)
        self.filled = np.zeros(rows, dtype=np.int32)
        self.hashed = np.zeros(rows, dtype=np.int32)
        self.prompt_len = np.zeros(rows, dtype=np.int32)
        self.max_length = np.zeros(rows, dtype=np.int32)
        self.min_tokens = np.zeros(rows, dtype=np.int32)
        self.num_blocks = np.zeros(rows, dtype=np.int32)
        self.tail = np.zeros(rows, dtype=np.int32)
        self.stream = np.zeros(rows, dtype=np.int32)
        self.connection = np.zeros(rows, dtype=np.int64)
        self.priority = np.zeros(rows, dtype=np.int64)
        self.arrival = np.zeros(rows, dtype=np.int64)
        self.last_step = np.full(rows, -1, dtype=np.int64)
        self.lane = np.zeros(rows, dtype=np.int64)
        self.eviction_said = np.zeros(rows, dtype=np.bool_)
        self.prefix_state = np.zeros((rows, 4), dtype=np.uint64)
        self.sequences: list[Sequence | None] = [None] * rows
        self.width = -(-max_model_len // block_size) + 1
        self.blocks = np.zeros((rows, self.width), dtype=np.int32)
        self.history = np.zeros((pool.first[-1], block_size), dtype=np.int32)
        self._blocks_flat = self.blocks.reshape(-1)
        self._history_flat = self.history.reshape(-1)
        self._stops = np.full((STOP_COLUMNS, rows), -1, dtype=np.int32)
        self._stop_width = 0
        self._many_stops: dict[int, npt.NDArray[np.int64]] = {}
        self._stop_pairs: npt.NDArray[np.int64] | None = None
        self._decoding: dict[int, tuple[I64, I64]] = {}
        self._edges = np.arange(replicas + 1) * rows_per_replica

    # ------------------------------------------------------------------------------------------------- whole steps

    def decoding(self, lane: int) -> tuple[I64, I64]:
        """Rows of the lane that decode, ascending, and int64 (replicas + 1,) where each replica's begin. Kept until the
        state of one of its rows changes."""
        found = self._decoding.get(lane)
        if found is None:
            rows = np.flatnonzero(self.status == DECODE)
            if self.lanes > 1:
                rows = rows[self.lane[rows] == lane]
            found = self._decoding[lane] = rows, self.bounds(rows)
        return found

    def bounds(self, rows: I64) -> I64:
        """int64 (replicas + 1,): where each replica's rows begin in ascending ``rows``."""
        return rows.searchsorted(self._edges)

    def set_status(self, row: int, status: int) -> None:
        """Every change of a row's state comes here or to :meth:`set_statuses`: :meth:`decoding` is found anew."""
        self.status[row] = status
        self._decoding.pop(int(self.lane[row]), None)

    def set_statuses(self, rows: I64, status: int) -> None:
        """As :meth:`set_status`, for all of ``rows`` at once."""
        self.status[rows] = status
        self._decoding.clear()

    def crossing(self, rows: I64) -> I64:
        """Those decoding rows whose next KV entry falls into a block that they do not have yet."""
        found: I64 = rows[(self.length[rows] - 1) % self.block_size == 0]
        return found

    def append_blocks(self, rows: I64, blocks: I64) -> None:
        """One more block for each row, which begins with the row's newest token if that is known already."""
        have = self.num_blocks[rows]
        self._blocks_flat[rows * self.width + have] = blocks
        self.num_blocks[rows] = have + 1
        self._history_flat[blocks * self.block_size] = self.tail[rows]

    def commit(self, rows: I64, tokens: I32) -> I32:
        """Books one sampled token for each row. Returns int32 (rows,): the position of each in its sequence."""
        position: I32 = self.known[rows]
        self.known[rows] = position + 1
        self.filled[rows] = position
        self.tail[rows] = tokens
        nth = position // self.block_size
        block = self._blocks_flat[rows * self.width + nth].astype(np.int64)
        self._history_flat[block * self.block_size + (position - nth * self.block_size)] = tokens
        return position

    def stopping(self, rows: I64, tokens: I32) -> npt.NDArray[np.bool_]:
        """bool (rows,): whether the token is one of the row's stop ids."""
        hit = np.zeros(len(rows), dtype=np.bool_)
        for column in range(self._stop_width):
            hit |= self._stops[column][rows] == tokens
        if self._many_stops:
            if self._stop_pairs is None:
                self._stop_pairs = np.sort(np.concatenate(list(self._many_stops.values())))
            pairs = (rows << 32) | tokens
            place = np.minimum(np.searchsorted(self._stop_pairs, pairs), len(self._stop_pairs) - 1)
            hit |= self._stop_pairs[place] == pairs
        return hit

    # --------------------------------------------------------------------------------------------------- single rows

    def enter(self, row: int, sequence: Sequence, cached: I64) -> None:
        """``sequence`` takes a free row; ``cached`` are the blocks of its prefix, already shared with it."""
        request = sequence.request
        length = len(sequence.tokens)
        self.lane[row] = sequence.lane
        self.set_status(row, PREFILL)
        self.length[row] = self.known[row] = length
        self.filled[row] = len(cached) * self.block_size
        self.hashed[row] = len(cached)
        self.prompt_len[row] = len(request.prompt)
        self.max_length[row] = sequence.max_length
        self.min_tokens[row] = request.sampling.min_tokens
        self.num_blocks[row] = len(cached)
        self.blocks[row, : len(cached)] = cached
        self.stream[row] = sequence.stream
        self.connection[row] = request.connection
        self.priority[row] = request.priority
        self.arrival[row] = sequence.arrival
        self.eviction_said[row] = False
        self.sequences[row] = sequence
        self._set_stops(row, request.sampling.stop_token_ids)

    def extend_prefill(self, row: int, tokens: I32, blocks: I64) -> None:
        """More blocks for a row in prefill, filled with the tokens (of its whole text) that belong there."""
        have = int(self.num_blocks[row])
        self.blocks[row, have : have + len(blocks)] = blocks
        self.num_blocks[row] = have + len(blocks)
        text = tokens[have * self.block_size : (have + len(blocks)) * self.block_size]
        whole = len(text) // self.block_size
        self.history[blocks[:whole]] = text[: whole * self.block_size].reshape(whole, self.block_size)
        rest = text[whole * self.block_size :]
        if len(rest):
            self.history[blocks[whole], : len(rest)] = rest

    def text(self, row: int, start: int) -> I32:
        """int32: the known tokens of a row that has its blocks, from position ``start`` on."""
        known = int(self.known[row])
        positions = np.arange(start, known)
        blocks = self.blocks[row, positions // self.block_size]
        tokens: I32 = self.history[blocks, positions % self.block_size]
        if known > start and blocks[-1] == 0:
            tokens[-1] = self.tail[row]
        return tokens

    def take_blocks(self, row: int, kept: int = 0) -> I64:
        """The blocks of the row, in order, which it has no longer: all but the first ``kept``."""
        count = int(self.num_blocks[row])
        blocks = self.blocks[row, kept:count].astype(np.int64)
        self.blocks[row, kept:count] = 0
        self.num_blocks[row] = min(kept, count)
        return blocks

    def clear(self, row: int) -> None:
        """The row is free again. Its blocks have been taken before."""
        self.set_status(row, FREE)
        self.sequences[row] = None
        self._stops[:, row] = -1
        if self._many_stops.pop(row, None) is not None:
            self._stop_pairs = None

    def _set_stops(self, row: int, stops: tuple[int, ...]) -> None:
        few = min(len(stops), STOP_COLUMNS)
        self._stops[:few, row] = stops[:few]
        self._stop_width = max(self._stop_width, few)
        if len(stops) > STOP_COLUMNS:
            self._many_stops[row] = (row << 32) | np.asarray(stops, dtype=np.int64)
            self._stop_pairs = None
