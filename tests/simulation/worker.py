"""A worker that holds its batch table strictly by the docstring of ``Step`` and checks every rule of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.protocol.messages import Admit, LogprobEntry, SamplingSpec, Step, StepDone
from tests.simulation.oracle import EMPTY, extend, next_token

NOTHING_WRITTEN = -1


class RuleBrokenError(AssertionError):
    """A rule was broken. The text says which and where."""


@dataclass(slots=True)
class Row:
    """``prefixes[p]`` is the hash of the text up to and including position p. ``lane``: in whose steps it computes."""

    tokens: list[int]
    prefixes: list[int]
    prompt_len: int
    computed: int
    blocks: list[int]
    sampling: SamplingSpec
    lane: int
    has_sampled: bool = False


class SimWorker:
    """One attention replica as its reporting rank answers for it, in one epoch. :meth:`execute` runs a step.

    ``rank`` stands in the answers; ``place``: the replica's in its group.
    """

    def __init__(self, config: CoreConfig, rank: int, place: int, num_blocks: int, term: int, epoch: int) -> None:
        self.config = config
        self.rank = rank
        self.place = place
        self.term = term
        self.epoch = epoch
        self.next_step = 0
        self.wave = -1
        self.num_blocks = num_blocks
        self.rows: dict[int, Row] = {}
        self.slots = [NOTHING_WRITTEN] * (num_blocks * config.block_size)

    def execute(self, step: Step) -> StepDone:
        self._check_header(step)
        for row in step.evicted.tolist():
            if self.rows.pop(row, None) is None:
                self._broken(step, f"row {row} is evicted and not there")
        for admit in step.admitted:
            self._admit(step, admit)
        self._append(step)
        counts = self._counts(step)
        self._compute(step, counts)
        return self._sample(step, counts)

    def _check_header(self, step: Step) -> None:
        if (step.term, step.epoch, step.step) != (self.term, self.epoch, self.next_step):
            self._broken(step, f"it is not step {self.next_step} of epoch {self.epoch}")
        if step.wave < self.wave:
            self._broken(step, f"wave {step.wave} after wave {self.wave}")
        if not 0 <= step.lane < self.config.pipeline_parallel_size:
            self._broken(step, f"lane {step.lane} does not exist")
        self.next_step += 1
        self.wave = step.wave

    def _admit(self, step: Step, admit: Admit) -> None:
        if not 0 <= admit.row < self.config.max_num_seqs:
            self._broken(step, f"row {admit.row} does not exist")
        if admit.row in self.rows:
            self._broken(step, f"row {admit.row} is admitted and still there")
        tokens, blocks = admit.tokens.tolist(), admit.blocks.tolist()
        if not 0 < admit.prompt_len <= len(tokens) < self.config.max_model_len:
            self._broken(step, f"row {admit.row}: {admit.prompt_len} prompt tokens of {len(tokens)}")
        # Only a row that is stated anew may go on in the middle of a block.
        partial = step.step > 0 and admit.num_cached % self.config.block_size
        if not 0 <= admit.num_cached < len(tokens) or partial:
            self._broken(step, f"row {admit.row}: {admit.num_cached} cached tokens of {len(tokens)}")
        prefixes: list[int] = []
        prefix = EMPTY
        for token in tokens:
            prefix = extend(prefix, token)
            prefixes.append(prefix)
        if not 0 <= admit.lane < self.config.pipeline_parallel_size:
            self._broken(step, f"row {admit.row}: lane {admit.lane} does not exist")
        self.rows[admit.row] = Row(tokens, prefixes, admit.prompt_len, admit.num_cached, [], admit.sampling, admit.lane)
        self._give_blocks(step, admit.row, blocks)

    def _append(self, step: Step) -> None:
        for row, block in zip(step.append_rows.tolist(), step.append_blocks.tolist(), strict=True):
            if row not in self.rows:
                self._broken(step, f"a block is appended to row {row}, which is not there")
            self._give_blocks(step, row, [block])

    def _give_blocks(self, step: Step, row: int, blocks: list[int]) -> None:
        held = self.rows[row].blocks
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                self._broken(step, f"block {block} does not exist")
            if block in held:
                self._broken(step, f"row {row} gets block {block} twice")
            held.append(block)

    def _counts(self, step: Step) -> dict[int, int]:
        """How many tokens each row computes; rows that compute none are left out."""
        counts: dict[int, int] = {}
        for row, count in zip(step.prefill_rows.tolist(), step.prefill_counts.tolist(), strict=True):
            if row not in self.rows or row in counts:
                self._broken(step, f"row {row} prefills twice or is not there")
            if self.rows[row].lane != step.lane:
                self._broken(step, f"row {row} of lane {self.rows[row].lane} prefills in a step of lane {step.lane}")
            if self.rows[row].has_sampled or not 0 < count <= len(self.rows[row].tokens) - self.rows[row].computed:
                self._broken(step, f"row {row} prefills {count} tokens from {self.rows[row].computed} on")
            counts[row] = count
        for number, row in self.rows.items():
            if row.has_sampled and row.lane == step.lane:
                counts[number] = 1
        total = sum(counts.values())
        if total != step.num_tokens_across_dp[self.place] or total > self.config.max_num_batched_tokens:
            self._broken(step, f"{total} tokens to compute, {step.num_tokens_across_dp.tolist()} announced")
        return counts

    def _compute(self, step: Step, counts: dict[int, int]) -> None:
        """Reads every KV slot that attention would read, then writes the new ones."""
        size = self.config.block_size
        owners: dict[int, int] = {}
        for row in self.rows.values():
            for block in row.blocks:
                owners[block] = owners.get(block, 0) + 1
        for number, count in counts.items():
            row = self.rows[number]
            end = row.computed + count
            if len(row.blocks) != -(-end // size):
                self._broken(step, f"row {number} computes up to {end} with {len(row.blocks)} blocks of {size}")
            slots = [block * size + i for block in row.blocks for i in range(size)]
            if [self.slots[slot] for slot in slots[: row.computed]] != row.prefixes[: row.computed]:
                self._broken(step, f"row {number} reads KV entries that are not its own prefix")
            for position in range(row.computed, end):
                if owners[row.blocks[position // size]] != 1:
                    self._broken(step, f"row {number} writes to block {row.blocks[position // size]}, which is shared")
                self.slots[slots[position]] = row.prefixes[position]
            row.computed = end

    def _sample(self, step: Step, counts: dict[int, int]) -> StepDone:
        tokens: list[int] = []
        places: list[int] = []
        entries: list[LogprobEntry] = []
        for number in sorted(counts):
            row = self.rows[number]
            if row.computed < len(row.tokens):
                continue
            token = next_token(row.prefixes[-1], row.sampling.seed, row.sampling.index, self.config.vocab_size)
            if row.sampling.logprobs >= 0:
                places.append(len(tokens))
                entries.append(LogprobEntry(token, -0.5, 1, _NO_TOKENS, _NO_LOGPROBS))
            tokens.append(token)
            row.tokens.append(token)
            row.prefixes.append(extend(row.prefixes[-1], token))
            row.has_sampled = True
            if len(row.tokens) > self.config.max_model_len:
                self._broken(step, f"row {number} is longer than the context")
        return StepDone(
            step.term,
            step.epoch,
            self.rank,
            step.step,
            np.asarray(tokens, dtype=np.int32),
            np.asarray(places, dtype=np.int32),
            tuple(entries),
        )

    def _broken(self, step: Step, text: str) -> None:
        raise RuleBrokenError(f"rank {self.rank}, step {step.step} of epoch {step.epoch}: {text}")


_NO_TOKENS = np.zeros(0, dtype=np.int32)
_NO_LOGPROBS = np.zeros(0, dtype=np.float32)
