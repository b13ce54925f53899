"""What the gathering of the attention replicas of an engine replica costs: the padding rule, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from drumline.engine.core.block_pool import I32
from drumline.protocol.padding import gather_plan, slice_counts


@dataclass(slots=True)
class GatherCounts:
    """Counts over planned steps and engine replicas. ``tokens`` were gathered, ``padding_rows`` computed beside them
    for nothing. ``padded_steps``: shares were padded to the largest; ``packed_steps``: shares of unequal size were
    packed. Where all are equal neither is needed."""

    tokens: int = 0
    padding_rows: int = 0
    padded_steps: int = 0
    packed_steps: int = 0

    def note(self, tokens: I32, attn_dp: int, attn_tp: int) -> None:
        """A step is planned. ``tokens``: int32 (replicas of the group,), ``attn_dp`` for each engine replica, the
        tokens of one shared out over ``attn_tp`` ranks."""
        counts: list[int] = tokens.tolist()
        for first in range(0, len(counts), attn_dp):
            shares = slice_counts(counts[first : first + attn_dp], attn_tp)
            gathered = gather_plan(shares)
            self.tokens += sum(shares)
            self.padding_rows += gathered.waste
            if gathered.padded:
                self.padded_steps += 1
            elif min(shares) != max(shares):
                self.packed_steps += 1
