"""Tokens to the ranks that hold their experts by gathering all of them, and the outputs home by one uneven all-to-all.

Nobody has to ask for sizes. How many tokens each rank brings follows from the step plan; how many outputs go where
follows on both sides from the experts that the router chose, which every rank knows once the tokens have been gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import InvalidConfig
from drumline.workers.collectives import Group
from drumline.workers.groups import GroupCoordinator

Bounds: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_WORD = torch.int32


class Rows:
    """A buffer of rows that grows to the largest use and stays there."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._storage = torch.empty(0, dtype=dtype, device=device)

    def take(self, rows: int, width: int) -> Tensor:
        """A contiguous (rows, width) tensor; its content is undefined and lasts until the next call."""
        size = rows * width
        if len(self._storage) < size:
            self._storage = torch.empty(max(size, 2 * len(self._storage)), dtype=self._dtype, device=self._device)
        return self._storage[:size].view(rows, width)


class GatherExchange:
    """The exchange of one expert group that gathers all tokens on all ranks; implements
    ``layers.moe.ExpertExchange``.

    Hidden states and expert ids travel in one buffer of 32-bit words, as bits. After an error of a collective the
    exchange must not be used again, because an operation left behind may still write to its buffers.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._sent = Rows(_WORD, group.device)
        self._home = Rows(torch.float32, group.device)
        self._pair_bounds = np.zeros(group.size + 1, dtype=np.int64)

    def dispatch(
        self, hidden: Tensor, topk_ids: Tensor, owners: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Gather the tokens of all ranks; see ``ExpertExchange.dispatch``. ``hidden`` is float32, or of two bytes.

        Raises:
            ProtocolError: ``counts`` does not fit the group or this rank's tokens (before any rank is waited for).
            EpochAborted, PeerLost, GroupTimeout: as every collective.
        """
        n, hidden_size = hidden.shape
        top_k = topk_ids.shape[1]
        words = count_words(hidden_size, hidden.dtype)
        sent = self._sent.take(n, words + top_k)
        sent[:, :words] = hidden.contiguous().view(_WORD)
        sent[:, words:] = topk_ids
        gathered = self._group.all_gather_rows(sent, counts)
        np.cumsum(np.multiply(counts, top_k), out=self._pair_bounds[1:])
        return gathered[:, :words].view(hidden.dtype), gathered[:, words:].to(torch.int64)

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        """Bring expert outputs home; see ``ExpertExchange.combine``.

        ``pair_index`` is ascending, so the outputs already lie grouped by home rank. What arrives lies grouped by the
        rank that computed it, in pair order within each, which is the stable order of the owners.

        Raises:
            EpochAborted, PeerLost, GroupTimeout: as every collective.
        """
        return bring_home(self._group, self._home, outputs, pair_index, owners, self._pair_bounds)


def bring_home(
    group: Group, room: Rows, outputs: Tensor, pair_index: Tensor, owners: Tensor, pair_bounds: Bounds
) -> Tensor:
    """One uneven all-to-all: every output to the rank that the pair's token came from, ``pair_bounds`` (ranks + 1,)
    saying which pairs those are. Returns this rank's own pairs in order."""
    sent = np.diff(np.searchsorted(pair_index.numpy(force=True), pair_bounds)).tolist()
    by_owner = owners.numpy(force=True)
    received = np.bincount(by_owner, minlength=group.world_size).tolist()
    arrived = room.take(len(by_owner), outputs.shape[1])
    group.all_to_all(arrived, outputs.contiguous(), received, sent)
    order = torch.from_numpy(np.argsort(by_owner, kind="stable")).to(owners.device)
    return torch.empty_like(arrived).index_copy_(0, order, arrived)


def count_words(hidden_size: int, dtype: torch.dtype) -> int:
    """32-bit words of one row of hidden states. Raises InvalidConfig when it is no whole number of them."""
    size = hidden_size * dtype.itemsize
    if size % _WORD.itemsize:
        raise InvalidConfig("hidden_size", hidden_size, f"an even number in {dtype} with expert parallel")
    return size // _WORD.itemsize
