"""What a step comes to: tokens, or a numeric fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drumline.protocol.errors import DrumlineError, ErrorInfo
from drumline.protocol.messages import I32, LogprobEntry

_NO_TOKENS = np.zeros(0, dtype=np.int32)


class NumericFault(DrumlineError):
    """NaN or infinity where a model's output should be. ``rows`` are the batch rows that it came from."""

    kind = "numeric"

    def __init__(self, rows: Sequence[int], what: str) -> None:
        shown = ", ".join(str(row) for row in rows)
        text = f"{what} are NaN or infinite in rows {shown}"
        super().__init__(text, ErrorInfo(kind=self.kind, text=text, field="rows", found=shown, valid="finite numbers"))
        self.rows = tuple(rows)


@dataclass(slots=True, frozen=True)
class StepOutput:
    """``tokens``: int32, of the rows that sampled, by ascending row. ``logprob_index``: int32, which of them asked for
    log probabilities; ``logprobs``: theirs."""

    tokens: I32
    logprob_index: I32
    logprobs: tuple[LogprobEntry, ...] = ()


NO_OUTPUT = StepOutput(_NO_TOKENS, _NO_TOKENS)
