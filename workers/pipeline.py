"""Hidden states from stage to stage, and sampled tokens from the last stage back to the first.

Both go over groups of their own, so that neither waits behind the other. Sends are started and left to run; receives of
tokens are posted when the step that samples them has been sent on, and waited for when a later step of the same lane
needs them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.workers.batch import BatchTable
from drumline.workers.collectives import Group, PendingRecv

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, frozen=True)
class _Sampled:
    """Tokens on their way to the first stage, and the rows that they belong to."""

    lane: int
    rows: Array
    tokens: PendingRecv


class Pipeline:
    """One rank's place in the pipeline: ``hidden`` and ``tokens`` are groups of the same ranks, by stage."""

    def __init__(self, hidden: Group, tokens: Group) -> None:
        self._hidden = hidden
        self._tokens = tokens
        self._sampled: deque[_Sampled] = deque()
        self._first, self._last = hidden.ranks[0], hidden.ranks[-1]
        place = hidden.rank_in_group
        self.is_first = place == 0
        self.is_last = place == hidden.world_size - 1
        self._previous = hidden.ranks[place - 1]
        self._next = hidden.ranks[(place + 1) % hidden.world_size]

    def receive_hidden(self, count: int, width: int, dtype: torch.dtype) -> Tensor:
        """The hidden states (count, width) of this step from the stage before."""
        return self._hidden.irecv((count, width), dtype, self._previous).wait()

    def send_hidden(self, hidden: Tensor) -> None:
        """Start to send the step's hidden states to the next stage."""
        self._hidden.isend(hidden.contiguous(), self._next)

    def send_tokens(self, tokens: Tensor) -> None:
        """The last stage: start to send int64 (rows,) tokens to the first stage."""
        self._tokens.isend(tokens.contiguous(), self._first)

    def expect_tokens(self, lane: int, rows: Array) -> None:
        """The first stage: the tokens that ``rows`` sample in this step will come."""
        self._sampled.append(_Sampled(lane, rows, self._tokens.irecv((len(rows),), torch.int64, self._last)))

    def take_tokens(self, lane: int, batch: BatchTable) -> None:
        """The first stage: put the tokens of earlier steps into the table, up to the newest of ``lane``."""
        while any(entry.lane == lane for entry in self._sampled):
            entry = self._sampled.popleft()
            batch.set_last_tokens(entry.rows, entry.tokens.wait())
