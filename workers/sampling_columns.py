"""Sampling parameters of every row, as columns: those of a step's rows are taken by index."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from drumline.protocol.messages import SamplingSpec
from drumline.workers.sampler import SamplingRows

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_INT32_MAX = np.iinfo(np.int32).max


class SamplingColumns:
    """Sampling parameters by row."""

    def __init__(self, rows: int) -> None:
        self.seed = np.zeros(rows, dtype=np.uint64)
        self.index = np.zeros(rows, dtype=np.int64)
        self.floats = np.zeros((rows, 6), dtype=np.float32)
        self.integers = np.zeros((rows, 3), dtype=np.int32)
        self.stop_token_ids: list[tuple[int, ...]] = [()] * rows

    def set(self, row: int, spec: SamplingSpec) -> None:
        """The row's parameters are those of ``spec``. Its seed is taken modulo 2**64."""
        self.seed[row] = spec.seed & ((1 << 64) - 1)
        self.index[row] = spec.index
        self.floats[row] = (
            spec.temperature,
            spec.top_p,
            spec.min_p,
            spec.repetition_penalty,
            spec.presence_penalty,
            spec.frequency_penalty,
        )
        # Clamped: the columns are int32 and the numbers a user's. No vocabulary or length reaches the limit.
        self.integers[row] = np.clip((spec.top_k, spec.min_tokens, spec.logprobs), -1, _INT32_MAX)
        self.stop_token_ids[row] = spec.stop_token_ids

    def take(self, rows: Array, generated: Array) -> SamplingRows:
        """The parameters of ``rows`` int64, in that order; ``generated`` int64: tokens that each has generated so far.
        ``stop_token_ids`` is empty when no row is below its ``min_tokens``."""
        floats, integers = self.floats[rows].T, self.integers[rows].T
        early = integers[1] > generated
        stops = [self.stop_token_ids[row] for row in rows.tolist()] if early.any() else []
        return SamplingRows(
            seed=self.seed[rows],
            index=self.index[rows],
            position=generated,
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            repetition_penalty=floats[3],
            presence_penalty=floats[4],
            frequency_penalty=floats[5],
            top_k=integers[0],
            min_tokens=integers[1],
            logprobs=integers[2],
            stop_token_ids=stops,
        )
