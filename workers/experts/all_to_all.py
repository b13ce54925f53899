"""Tokens only to the ranks that hold one of their experts: three uneven all-to-alls per layer, the first of sizes.

It moves fewer rows than gathering when few of the ranks have an expert of a token, and pays one more collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.workers.collectives import Group
from drumline.workers.experts.exchange import Rows, bring_home, count_words

_WORD = torch.int32


class AllToAllExchange:
    """The exchange of one expert group by all-to-all; implements ``layers.moe.ExpertExchange``.

    A row is a token's hidden state as 32-bit words and its slots; a token goes once to each rank that owns any of them.
    Buffers and errors are those of :class:`~drumline.workers.experts.exchange.GatherExchange`.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._ranks = torch.arange(group.world_size, device=device).view(-1, 1, 1)
        self._sizes = Rows(_WORD, device)
        self._received = Rows(_WORD, device)
        self._home = Rows(torch.float32, device)
        self._pair_bounds = np.zeros(group.world_size + 1, dtype=np.int64)

    def dispatch(self, hidden: Tensor, slots: Tensor, owners: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Send each token where its experts are; see ``ExpertExchange.dispatch``.

        Raises:
            ProtocolError: ``counts`` does not fit the group or this rank's tokens, or a rank announces an impossible
                number of rows.
            EpochAborted, PeerLost, GroupTimeout: as every collective.
        """
        n, hidden_size = hidden.shape
        top_k, size = slots.shape[1], self._group.world_size
        if len(counts) != size or counts[self._group.rank_in_group] != n:
            place = self._group.rank_in_group
            raise ProtocolError(f"rank {place} of {size} brings {n} tokens; the step's counts are {list(counts)}")
        wanted = (owners.view(1, n, top_k) == self._ranks).any(-1)
        sent = wanted.sum(1)
        tokens = wanted.nonzero()[:, 1]
        received = self._exchange_sizes(sent, counts)
        words = count_words(hidden_size, hidden.dtype)
        rows = torch.cat([hidden.contiguous().view(_WORD), slots.to(_WORD)], dim=1).index_select(0, tokens)
        arrived = self._received.take(sum(received), words + top_k)
        self._group.all_to_all(arrived, rows, received, sent.tolist())
        np.cumsum(np.multiply(received, top_k), out=self._pair_bounds[1:])
        return arrived[:, :words].contiguous().view(hidden.dtype), arrived[:, words:].to(torch.int64)

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        """Bring expert outputs home; see ``ExpertExchange.combine``."""
        return bring_home(self._group, self._home, outputs, pair_index, owners, self._pair_bounds)

    def _exchange_sizes(self, sent: Tensor, counts: Sequence[int]) -> list[int]:
        each = [1] * self._group.world_size
        sizes = self._sizes.take(self._group.world_size, 1)
        self._group.all_to_all(sizes, sent.to(_WORD).view(-1, 1), each, each)
        received: list[int] = sizes.view(-1).tolist()
        for rank, (found, most) in enumerate(zip(received, counts, strict=True)):
            if not 0 <= found <= most:
                raise ProtocolError(f"rank {rank} announces {found} rows of its {most} tokens")
        return received
