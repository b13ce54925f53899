"""Layers whose weights are cut over ranks: each computes with its part, and the ranks add up or gather the results.

Column-parallel products (rows of the weight) need nothing from others; the row-parallel ones that follow them (columns
of the weight) give partial sums, which are added in rank order. https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.shards import Span
from drumline.workers.collectives import Group, LoneGroup
from drumline.workers.layers.linear import Linear
from drumline.workers.layers.mlp import GatedMlp
from drumline.workers.step_tokens import StepTokens


class ModelGroups:
    """The groups that a model's layers meet in; replaced at every epoch, for all layers at once.

    ``tp``: the ranks that share the stage's networks. ``attn_tp``: those that share the heads of the attention replica.
    ``experts``: those that hold the stage's experts, over all engine replicas.
    """

    def __init__(self) -> None:
        self.tp: Group = LoneGroup()
        self.attn_tp: Group = LoneGroup()
        self.experts: Group = LoneGroup()

    def leave(self) -> None:
        """The epoch is over: nothing of it is used again."""
        self.tp = self.attn_tp = self.experts = LoneGroup()


class RowParallelLinear:
    """y = x W^T + b, where this rank has columns of W and the matching channels of x. ``bias`` is whole, on every rank,
    and added once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: ModelGroups):
        self.linear = Linear(weight)
        self.bias = bias
        self._groups = groups

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.linear.pack()

    def __call__(self, x: Tensor) -> Tensor:
        """(n, own in) to (n, out), the same on all ranks of the attention replica."""
        group = self._groups.attn_tp
        y = self.linear(x)
        if group.world_size > 1:
            y = group.all_reduce(y)
        return y if self.bias is None else y + self.bias


class VocabEmbedding:
    """Rows ``vocab`` of the embedding; the ranks of an attention replica have all rows between them."""

    def __init__(self, weight: Tensor, vocab: Span, groups: ModelGroups):
        self.weight = weight
        self._first, self._end = vocab
        self._groups = groups

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 (n,) to (n, hidden)."""
        group = self._groups.attn_tp
        if group.world_size == 1:
            return F.embedding(token_ids, self.weight)
        elsewhere = (token_ids < self._first) | (token_ids >= self._end)
        local = (token_ids - self._first).masked_fill_(elsewhere, 0)
        if len(self.weight):
            x = F.embedding(local, self.weight).masked_fill_(elsewhere.unsqueeze(1), 0)
        else:
            x = self.weight.new_zeros(len(token_ids), self.weight.shape[1])
        return group.all_reduce(x)


class VocabHead:
    """The output projection: each rank has the logits of its part of the vocabulary, the first one gathers them.

    ``widths``: vocabulary entries of every rank of the attention replica.
    """

    def __init__(self, weight: Tensor, widths: Sequence[int], groups: ModelGroups):
        self.linear = Linear(weight)
        self._widths = widths
        self._groups = groups

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.linear.pack()

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """(n, hidden) to float32 (n, vocabulary) on the first rank of the attention replica, None on the others."""
        group = self._groups.attn_tp
        logits = self.linear(hidden)
        if group.world_size == 1:
            return logits.float()
        whole = group.gather_columns(logits, self._widths, group.ranks[0])
        return None if whole is None else whole.float()


class ParallelMlp:
    """The dense network of one layer, its channels cut over the tp ranks of an engine replica.

    With several attention replicas each rank brings its share of its replica's tokens, all compute with all of them,
    and the sums go back to whoever brought the tokens.
    """

    def __init__(self, mlp: GatedMlp, groups: ModelGroups):
        self.mlp = mlp
        self._groups = groups

    def pack(self) -> None:
        """See :meth:`Linear.pack`."""
        self.mlp.pack()

    def __call__(self, x: Tensor, tokens: StepTokens) -> Tensor:
        """(own tokens, hidden) to the same. Replicas without tokens call it too."""
        tp = self._groups.tp
        if tp.world_size == 1:
            return self.mlp(x)
        if tokens.gathered is None:
            return tp.all_reduce(self.mlp(x)) if len(x) else x
        plan = tokens.gathered
        if not sum(plan.tokens):
            return x
        start, end = tokens.share
        mine = x[start:end]
        if plan.padded:
            mine = F.pad(mine, (0, 0, 0, plan.rows[tp.rank_in_group] - len(mine)))
        partial = self.mlp(tp.all_gather_rows(mine.contiguous(), plan.rows))
        own = tp.reduce_scatter_rows(partial, plan.rows)[: end - start]
        return gather_shares(own, tokens, self._groups.attn_tp)


def gather_shares(own: Tensor, tokens: StepTokens, attn_tp: Group) -> Tensor:
    """From the results of this rank's share of its replica's tokens to those of all of them, on every rank."""
    if attn_tp.world_size == 1:
        return own
    if not tokens.own:
        return own
    return attn_tp.all_gather_rows(own.contiguous(), tokens.shares)
