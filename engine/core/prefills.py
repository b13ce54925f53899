"""Rows whose known text is not computed yet, and how much of each the next step may compute."""

from __future__ import annotations

from drumline.engine.core.batch_table import BatchTable
from drumline.engine.core.request import Sequence


class Prefills:
    """The sequences in prefill of every replica of a lockstep group."""

    def __init__(self, table: BatchTable) -> None:
        self._table = table
        self._sequences: list[list[Sequence]] = [[] for _ in range(table.replicas)]

    def any(self, replica: int) -> bool:
        """Whether a row of the replica is in prefill, whatever its lane."""
        return bool(self._sequences[replica])

    def add(self, sequence: Sequence) -> None:
        """The sequence has entered a row."""
        self._sequences[sequence.replica].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is computed, or has left its row; one that is not in prefill changes nothing."""
        if sequence in self._sequences[sequence.replica]:
            self._sequences[sequence.replica].remove(sequence)

    def clear(self) -> None:
        """All rows are empty."""
        for sequences in self._sequences:
            sequences.clear()

    def chunks(self, replica: int, lane: int, budget: int) -> list[tuple[Sequence, int]]:
        """Sequences of the lane, the most deserving first, and how much of each a budget of tokens lets compute."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._sequences[replica], key=_order):
            if sequence.lane != lane:
                continue
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count == 0:
                break
            chunks.append((sequence, count))
            budget -= count
        return chunks

    def blocks_missing(self, sequence: Sequence, count: int) -> int:
        """How many blocks the row lacks to compute ``count`` tokens more."""
        needed = -(-(sequence.computed + count) // self._table.block_size)
        return needed - int(self._table.num_blocks[sequence.row])


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
