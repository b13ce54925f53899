"""The rows of a replica on its rank: the table that a :class:`Step` is a difference against.

Lengths, counts and block tables follow from the plans alone, so they live in numpy on the host; the ids of sampled
tokens stay on the device, where the next step finds them without waiting for anyone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Admit, Step
from drumline.workers.sampler import SamplingRows, TokenHistory
from drumline.workers.sampling_columns import SamplingColumns

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, frozen=True)
class StepRows:
    """What the rows compute in one step: first the decoding rows, one token each, then the prefilling ones.

    All int64. ``rows`` and ``counts`` by row, ``positions`` and ``slots`` by token, ``ends`` the number of tokens up to
    and with each row. ``sampling``: indices into ``rows`` of those that sample, by ascending row.
    """

    num_decode: int
    rows: Array
    counts: Array
    positions: Array
    slots: Array
    ends: Array
    sampling: Array

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return len(self.positions)

    @property
    def sampling_rows(self) -> Array:
        """The rows that sample, int64, ascending."""
        return self.rows[self.sampling]

    @property
    def each_token_samples(self) -> bool:
        """Whether token i of the step is the last of sampling row i, for all of them."""
        return len(self.sampling) == self.num_tokens and bool((self.last_tokens == np.arange(self.num_tokens)).all())

    @property
    def last_tokens(self) -> Array:
        """The index, among the step's tokens, of each sampling row's last."""
        return self.ends[self.sampling] - 1


class BatchTable:
    """Rows 0 to max_num_seqs - 1, their blocks, lengths and sampling parameters."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ):
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self._clear()

    def _clear(self) -> None:
        rows = self.max_num_seqs
        width = -(-self.max_model_len // self.block_size)
        self.block_table = np.zeros((rows, width), dtype=np.int64)
        self.blocks_held = np.zeros(rows, dtype=np.int64)
        self.active = np.zeros(rows, dtype=bool)
        self.decoding = np.zeros(rows, dtype=bool)
        self.length = np.zeros(rows, dtype=np.int64)
        self.computed = np.zeros(rows, dtype=np.int64)
        self.lane = np.zeros(rows, dtype=np.int64)
        self.prompt_len = np.zeros(rows, dtype=np.int64)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._sampling = SamplingColumns(rows)
        # Ids of rows that have not sampled yet; from then on the device knows the last one and the pages the others.
        self._pending: dict[int, Array] = {}

    def reset(self) -> None:
        """Forget every row; the first step of an epoch states them anew."""
        self._clear()

    # ------------------------------------------------------------------------------------------------ applying a step

    def apply(self, step: Step) -> StepRows:
        """Apply what the step changes and say what it computes.

        Raises ProtocolError, naming the row, when the step does not fit the table.
        """
        self._evict(step.evicted)
        for admit in step.admitted:
            self._admit(admit)
        self._append(step.append_rows, step.append_blocks)
        return self._plan(step)

    def _evict(self, rows: Array) -> None:
        if not len(rows):
            return
        self._check_rows("evicted", rows)
        self.active[rows] = False
        self.decoding[rows] = False
        self.blocks_held[rows] = 0
        for row in rows.tolist():
            self._pending.pop(row, None)

    def _admit(self, admit: Admit) -> None:
        row, length, blocks = admit.row, len(admit.tokens), len(admit.blocks)
        if not 0 <= row < self.max_num_seqs:
            raise ProtocolError(f"admitted row {row} is outside 0 to {self.max_num_seqs - 1}")
        if not 1 <= length <= self.max_model_len:
            raise ProtocolError(f"row {row} is admitted with {length} tokens; valid: 1 to {self.max_model_len}")
        if not 1 <= admit.prompt_len <= length or not 0 <= admit.num_cached < length:
            raise ProtocolError(
                f"row {row} is admitted with {length} tokens, a prompt of {admit.prompt_len}, {admit.num_cached} cached"
            )
        if blocks > self.block_table.shape[1] or admit.num_cached > blocks * self.block_size:
            raise ProtocolError(f"row {row} is admitted with {blocks} blocks and {admit.num_cached} cached tokens")
        self._check_blocks(admit.blocks)
        if admit.tokens.min() < 0 or admit.tokens.max() >= self.vocab_size:
            raise ProtocolError(f"row {row} is admitted with token ids outside 0 to {self.vocab_size - 1}")
        self.active[row] = True
        self.decoding[row] = False
        self.length[row] = length
        self.computed[row] = admit.num_cached
        self.lane[row] = admit.lane
        self.prompt_len[row] = admit.prompt_len
        self.blocks_held[row] = blocks
        self.block_table[row, :blocks] = admit.blocks
        self._pending[row] = admit.tokens
        self._sampling.set(row, admit.sampling)

    def _append(self, rows: Array, blocks: Array) -> None:
        if len(rows) != len(blocks):
            raise ProtocolError(f"{len(rows)} rows for {len(blocks)} appended blocks")
        if not len(rows):
            return
        self._check_rows("append", rows)
        self._check_blocks(blocks)
        # A row that stands here several times takes its blocks in order: count the earlier ones of the same row.
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        earlier = np.empty(len(rows), dtype=np.int64)
        earlier[order] = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
        places = self.blocks_held[rows] + earlier
        if places.max() >= self.block_table.shape[1]:
            row = int(rows[places.argmax()])
            raise ProtocolError(f"row {row} would hold more than {self.block_table.shape[1]} blocks")
        self.block_table[rows, places] = blocks
        np.add.at(self.blocks_held, rows, 1)

    def _plan(self, step: Step) -> StepRows:
        named, named_counts = step.prefill_rows, step.prefill_counts
        decodes = self.decoding & (self.lane == step.lane)
        prefill_rows = prefill_counts = np.zeros(0, dtype=np.int64)
        if len(named) or len(named_counts):
            prefill_rows, prefill_counts = self._check_named(named, named_counts, step.lane)
            # A row that decodes may be named too: with 0 it waits, with 1 it does what it would have done.
            waits = prefill_rows[prefill_counts == 0]
            decodes[waits] = False
            prefills = (prefill_counts > 0) & ~self.decoding[prefill_rows]
            prefill_rows, prefill_counts = prefill_rows[prefills], prefill_counts[prefills]
        decode_rows = self._by_length(np.flatnonzero(decodes))
        rows = np.concatenate([decode_rows, prefill_rows])
        counts = np.concatenate([np.ones(len(decode_rows), dtype=np.int64), prefill_counts])
        ends = counts.cumsum()
        start = self.computed[rows]
        needed = start + counts
        self._check_room(rows, needed)
        if len(prefill_rows):
            by_token = np.repeat(np.arange(len(rows)), counts)
            positions = start[by_token] + np.arange(len(by_token)) - (ends - counts)[by_token]
            token_rows = rows[by_token]
        else:
            positions, token_rows = start, rows
        blocks = self.block_table[token_rows, positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        sampling = np.flatnonzero(needed == self.length[rows])
        sampling = sampling[rows[sampling].argsort()]
        return StepRows(len(decode_rows), rows, counts, positions, slots, ends, sampling)

    def _by_length(self, rows: Array) -> Array:
        """Decoding rows in ascending order of length, if their lengths differ much: neighbours are gathered together
        and padded to the longest of them."""
        lengths = self.computed[rows]
        if len(rows) < 2 or lengths.max() < 1.5 * lengths.min() + self.block_size:
            return rows
        return rows[lengths.argsort(kind="stable")]

    def _check_named(self, named: Array, named_counts: Array, lane: int) -> tuple[Array, Array]:
        if len(named) != len(named_counts):
            raise ProtocolError(f"{len(named)} prefill rows with {len(named_counts)} counts")
        self._check_rows("prefill", named)
        rows, counts = named.astype(np.int64), named_counts.astype(np.int64)
        if len(np.unique(rows)) != len(rows):
            raise ProtocolError(f"a row is named twice among the prefill rows {rows.tolist()}")
        astray = (self.lane[rows] != lane) & (counts > 0)
        if astray.any():
            row = int(rows[astray][0])
            raise ProtocolError(f"row {row} of lane {int(self.lane[row])} shall compute in a step of lane {lane}")
        wrong = (counts < 0) | (counts > self.length[rows] - self.computed[rows])
        if wrong.any():
            row, count = int(rows[wrong][0]), int(counts[wrong][0])
            left = int(self.length[row] - self.computed[row])
            raise ProtocolError(f"row {row} shall compute {count} tokens; valid: 0 to {left}")
        return rows, counts

    def _check_room(self, rows: Array, needed: Array) -> None:
        short = (needed > self.blocks_held[rows] * self.block_size) | (needed > self.max_model_len)
        if short.any():
            row = int(rows[short][0])
            raise ProtocolError(
                f"row {row} computes up to token {int(needed[short][0])} with {int(self.blocks_held[row])} blocks of "
                f"{self.block_size} and a max_model_len of {self.max_model_len}"
            )

    def _check_rows(self, what: str, rows: Array) -> None:
        if rows.min() < 0 or rows.max() >= self.max_num_seqs:
            raise ProtocolError(f"{what} rows {rows.tolist()} are not all within 0 to {self.max_num_seqs - 1}")
        if not self.active[rows].all():
            raise ProtocolError(f"{what} rows {rows[~self.active[rows]].tolist()} are empty")

    def _check_blocks(self, blocks: Array) -> None:
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= self.num_blocks):
            raise ProtocolError(f"blocks {blocks.tolist()} are not all within 0 to {self.num_blocks - 1}")

    # -------------------------------------------------------------------------------------------------- around a step

    def input_ids(self, plan: StepRows) -> Tensor:
        """The ids of the step's tokens, int64 (n,) on the device."""
        decode = plan.rows[: plan.num_decode]
        parts = [self.last_token.index_select(0, self.on_device(decode))] if len(decode) else []
        prefill = plan.rows[plan.num_decode :]
        if len(prefill):
            start = self.computed[prefill]
            end = start + plan.counts[plan.num_decode :]
            spans = zip(prefill.tolist(), start.tolist(), end.tolist(), strict=True)
            ids = np.concatenate([self._pending[row][a:b] for row, a, b in spans])
            parts.append(self.on_device(ids.astype(np.int64)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sampling_rows(self, plan: StepRows) -> SamplingRows:
        """Sampling parameters of the rows that sample, before :meth:`advance`."""
        rows = plan.sampling_rows
        return self._sampling.take(rows, self.length[rows] - self.prompt_len[rows])

    def history(self, rows: Array, paged_tokens: Tensor) -> TokenHistory:
        """Prompt and output so far of ``rows``, read through their block tables from the ids beside the blocks."""
        lengths = self.length[rows]
        width = -(-int(lengths.max()) // self.block_size)
        blocks = self.on_device(self.block_table[rows, :width].reshape(-1))
        tokens = paged_tokens.view(-1, self.block_size).index_select(0, blocks).view(len(rows), -1).long()
        places = torch.arange(tokens.shape[1], device=self.device)
        known = places < self.on_device(lengths).unsqueeze(1)
        generated = known & (places >= self.on_device(self.prompt_len[rows]).unsqueeze(1))
        return TokenHistory(tokens, known, generated)

    def advance(self, plan: StepRows, sampled: Tensor | None) -> None:
        """The step is done; ``sampled`` int64 (sampling rows,) are its tokens, None where they are not known (yet)."""
        self.computed[plan.rows] += plan.counts
        rows = plan.sampling_rows
        if sampled is not None:
            self.set_last_tokens(rows, sampled)
        self.length[rows] += 1
        fresh = rows[~self.decoding[rows]]
        self.decoding[fresh] = True
        for row in fresh.tolist():
            del self._pending[row]

    def set_last_tokens(self, rows: Array, tokens: Tensor) -> None:
        """The newest token of each of ``rows``: int64 (rows,) on the device."""
        self.last_token.index_copy_(0, self.on_device(rows), tokens)

    def on_device(self, values: Array) -> Tensor:
        """An int64 or float array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)
