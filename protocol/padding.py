"""How the tokens of several replicas are laid out when they are gathered into one batch.

Replicas bring unequal counts. Padding every share to the largest makes all equal, which is the fastest gather, and
computes rows for nothing; packing computes only what there is. Shares are padded while at least half of the rows that
result are real: ``2 * sum >= max * shares``; else they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from drumline.protocol.shards import split


class GatherPlan(msgspec.Struct, frozen=True):
    """``rows``: how many rows each share takes in the gathered batch; ``tokens``: how many of them are tokens."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def padded(self) -> bool:
        """Whether any share has rows without a token."""
        return self.rows != self.tokens

    @property
    def waste(self) -> int:
        """Rows without a token."""
        return sum(self.rows) - sum(self.tokens)


def gather_plan(tokens: Sequence[int]) -> GatherPlan:
    """Pad or pack the shares that bring ``tokens`` tokens each."""
    most = max(tokens, default=0)
    counts = tuple(tokens)
    if 2 * sum(counts) >= most * len(counts):
        return GatherPlan((most,) * len(counts), counts)
    return GatherPlan(counts, counts)


def slice_counts(tokens: Sequence[int], ranks: int) -> list[int]:
    """Tokens of each rank when the ``ranks`` ranks of every replica share out the replica's ``tokens`` between them:
    by replica, then by rank."""
    return [end - start for count in tokens for start, end in (split(count, ranks, part) for part in range(ranks))]
