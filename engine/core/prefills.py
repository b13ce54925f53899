"""Rows whose known text is not computed yet, and how much of each the next step may compute."""

from __future__ import annotations

from collections.abc import Iterable

from drumline.engine.core.batch_table import BatchTable
from drumline.engine.core.request import Sequence


class Prefills:
    """The sequences in prefill of every replica of a lockstep group. Unless ``chunked``, each is computed in one
    step."""

    def __init__(self, table: BatchTable, chunked: bool) -> None:
        self._table = table
        self._chunked = chunked
        self._sequences: list[list[Sequence]] = [[] for _ in range(table.replicas)]

    def any(self, replica: int) -> bool:
        """Whether a row of the replica is in prefill, whatever its lane."""
        return bool(self._sequences[replica])

    def count(self, replica: int, lane: int) -> int:
        """How many sequences of the lane are in prefill."""
        return sum(sequence.lane == lane for sequence in self._sequences[replica])

    def add(self, sequence: Sequence) -> None:
        """The sequence has entered a row."""
        self._sequences[sequence.replica].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is computed, or has left its row; one that is not in prefill changes nothing."""
        if sequence in self._sequences[sequence.replica]:
            self._sequences[sequence.replica].remove(sequence)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """These and no others are in prefill."""
        for before in self._sequences:
            before.clear()
        for sequence in sequences:
            self.add(sequence)

    def of(self, replica: int) -> list[Sequence]:
        """The sequences of the replica that are in prefill, whatever their lanes."""
        return list(self._sequences[replica])

    def chunks(self, replica: int, lane: int, budget: int) -> list[tuple[Sequence, int]]:
        """Sequences of the lane, the most deserving first, and how much of each a budget of tokens lets compute."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._sequences[replica], key=_order):
            if sequence.lane != lane:
                continue
            left = len(sequence.tokens) - sequence.computed
            count = min(left, budget)
            if count == 0 or (count < left and not self._chunked):
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
