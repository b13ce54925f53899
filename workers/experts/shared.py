"""The expert exchange among ranks of one host, through memory that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.workers.experts.exchange import GatherExchange, Rows, count_words
from drumline.workers.groups import GroupCoordinator
from drumline.workers.groups.mailboxes import HALF_BYTES, Mailboxes


class SharedExchange:
    """Implements ``layers.moe.ExpertExchange`` in the mailboxes' memory; a step too large for a half of them goes by
    the group's collectives, in rounds.

    Which way a step goes follows from its token counts, so that all ranks take the same one. Views, buffers and errors
    are those of :class:`GatherExchange`.
    """

    def __init__(self, group: GroupCoordinator, boxes: Mailboxes) -> None:
        self._group = group
        self._boxes = boxes
        self._large = GatherExchange(group)
        self._gathered = Rows(torch.int32, group.device)
        self._home = Rows(torch.float32, group.device)
        self._pair_bounds = np.zeros(group.size + 1, dtype=np.int64)
        self._too_large = False

    def dispatch(
        self, hidden: Tensor, topk_ids: Tensor, owners: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Gather the tokens of all ranks; see ``ExpertExchange.dispatch`` and ``GatherExchange.dispatch``."""
        n, hidden_size = hidden.shape
        top_k = topk_ids.shape[1]
        words = count_words(hidden_size, hidden.dtype)
        # The larger of the two exchanges: each output may have to come from one rank.
        self._too_large = sum(counts) * max(top_k * hidden_size, words + top_k) * 4 > HALF_BYTES
        if self._too_large:
            return self._large.dispatch(hidden, topk_ids, owners, counts)
        self._group.check_counts(counts, n)
        np.cumsum(np.multiply(counts, top_k), out=self._pair_bounds[1:])
        boxes, width = self._boxes, words + top_k
        with self._group.collective():
            operation = boxes.begin()
            mine = boxes.content(boxes.position, operation)[: n * width].view(n, width)
            mine[:, :words] = hidden.contiguous().view(torch.int32)
            mine[:, words:] = topk_ids
            boxes.publish(operation)
            gathered = self._gathered.take(sum(counts), width)
            start = 0
            for position, count in enumerate(counts):
                boxes.wait_for(position, operation)
                end = start + count
                gathered[start:end] = boxes.content(position, operation)[: count * width].view(count, width)
                start = end
        return gathered[:, :words].view(hidden.dtype), gathered[:, words:].to(torch.int64)

    def combine(self, outputs: Tensor, pair_index: Tensor, owners: Tensor) -> Tensor:
        """Bring expert outputs home; see ``ExpertExchange.combine`` and ``GatherExchange.combine``."""
        if self._too_large:
            return self._large.combine(outputs, pair_index, owners)
        boxes, width = self._boxes, outputs.shape[1]
        by_owner = owners.numpy()
        received = np.bincount(by_owner, minlength=self._group.size).tolist()
        arrived = self._home.take(len(by_owner), width)
        with self._group.collective():
            operation = boxes.begin()
            mine = boxes.content(boxes.position, operation)[: len(outputs) * width].view(torch.float32)
            mine.view(outputs.shape).copy_(outputs)
            bounds = np.searchsorted(pair_index.numpy(), self._pair_bounds)
            boxes.bounds(boxes.position, operation).copy_(torch.from_numpy(bounds))
            boxes.publish(operation)
            start = 0
            for position, count in enumerate(received):
                boxes.wait_for(position, operation)
                first, last = boxes.bounds(position, operation)[boxes.position : boxes.position + 2].tolist()
                if last - first != count:
                    raise ProtocolError(f"rank {position} computed {last - first} outputs for this one, not {count}")
                content = boxes.content(position, operation)[first * width : last * width]
                arrived[start : start + count] = content.view(torch.float32).view(count, width)
                start += count
        order = torch.from_numpy(np.argsort(by_owner, kind="stable"))
        return torch.empty_like(arrived).index_copy_(0, order, arrived)
