"""Layers cut over ranks give what they give whole; ranks are threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drumline.protocol.shards import split
from drumline.workers.layers import GatedMlp, ParallelMlp, RowParallelLinear, VocabEmbedding, VocabHead
from drumline.workers.step_tokens import ReplicaPlace, StepTokens
from tests.parity.threadgroup import ThreadGroup, ThreadMember
from tests.unit.workers.threads import model_groups, on_ranks

HIDDEN, WIDTH = 6, 8


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_parallel_product_adds_its_bias_once(biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, WIDTH).to(dtype), torch.randn(3, WIDTH).to(dtype)
    bias = torch.randn(5).to(dtype) if biased else None

    def rank(member: ThreadMember) -> Tensor:
        start, end = split(WIDTH, 4, member.rank)
        layer = RowParallelLinear(weight[:, start:end].contiguous(), bias, model_groups(member))
        return layer(x[:, start:end])

    found = on_ranks(4, rank)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    for other in found:
        assert other.dtype == dtype
        assert torch.equal(other, found[0])
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(other.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("vocab", "ranks"), [(10, 2), (250, 4), (3, 4)])
def test_every_token_id_finds_its_row_whichever_rank_has_it(vocab: int, ranks: int) -> None:
    torch.manual_seed(1)
    weight, ids = torch.randn(vocab, HIDDEN), torch.arange(vocab).flip(0)

    def rank(member: ThreadMember) -> Tensor:
        span = split(vocab, ranks, member.rank)
        return VocabEmbedding(weight[slice(*span)], span, model_groups(member))(ids)

    for found in on_ranks(ranks, rank):
        assert torch.equal(found, weight[ids])


@pytest.mark.parametrize(("vocab", "ranks"), [(10, 2), (250, 4), (3, 4)])
def test_the_first_rank_has_all_logits_in_the_order_of_the_vocabulary(vocab: int, ranks: int) -> None:
    torch.manual_seed(2)
    weight, hidden = torch.randn(vocab, HIDDEN).bfloat16(), torch.randn(4, HIDDEN).bfloat16()
    spans = [split(vocab, ranks, part) for part in range(ranks)]
    widths = [end - start for start, end in spans]

    def rank(member: ThreadMember) -> Tensor | None:
        head = VocabHead(weight[slice(*spans[member.rank])].contiguous(), widths, model_groups(member))
        return head(hidden)

    first, *others = on_ranks(ranks, rank)
    assert others == [None] * (ranks - 1)
    assert first is not None
    assert first.dtype == torch.float32
    # Each logit is rounded to bfloat16 by its product alone, never by where it was computed.
    torch.testing.assert_close(first, F.linear(hidden, weight).float(), rtol=1e-2, atol=1e-2)


def network(rank: int, ranks: int, groups_of: ThreadMember, attn_tp: ThreadMember) -> tuple[ParallelMlp, GatedMlp]:
    """Rank's part of a network and the whole of it."""
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(2 * WIDTH, HIDDEN, generator=generator)
    down = torch.randn(HIDDEN, WIDTH, generator=generator)
    start, end = split(WIDTH, ranks, rank)
    part = torch.cat([gate_up[start:end], gate_up[WIDTH + start : WIDTH + end]])
    mlp = GatedMlp(part, down[:, start:end].contiguous())
    return ParallelMlp(mlp, model_groups(groups_of, attn_tp=attn_tp)), GatedMlp(gate_up, down)


# Counts of the attention replicas: padded, packed (2 * sum < max * shares), replicas without a token, fewer tokens than
# ranks share them, nothing at all.
GATHERED = [[3, 3], [4, 1], [9, 0], [0, 9], [1, 0], [0, 1], [0, 0], [2, 5]]


@pytest.mark.parametrize("attn_tp", [1, 2])
@pytest.mark.parametrize("counts", GATHERED)
def test_attention_replicas_share_a_network_and_get_their_own_tokens_back(attn_tp: int, counts: list[int]) -> None:
    tokens = [torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(10 + count)) for count in counts]
    pairs = [ThreadGroup(range(first, first + attn_tp)) for first in range(0, 2 * attn_tp, attn_tp)]

    def rank(member: ThreadMember) -> tuple[Tensor, int]:
        replica, place = divmod(member.rank, attn_tp)
        of_rank = StepTokens.of(counts, ReplicaPlace(replica, 0, replica, 2, attn_tp, place))
        layer, _ = network(member.rank, 2 * attn_tp, member, pairs[replica].member(member.rank))
        return layer(tokens[replica], of_rank), member.collectives

    found = on_ranks(2 * attn_tp, rank)
    lone = ThreadGroup([0]).member(0)
    _, whole = network(0, 1, lone, lone)
    for number, (out, collectives) in enumerate(found):
        torch.testing.assert_close(out, whole(tokens[number // attn_tp]), rtol=1e-4, atol=1e-5)
        assert collectives == (2 if sum(counts) else 0)


def test_padded_and_packed_counts_are_both_among_those_above() -> None:
    plans = [StepTokens.of(counts, ReplicaPlace(attn_dp=2)).gathered for counts in GATHERED]
    assert {plan.padded for plan in plans if plan is not None} == {True, False}
    assert None not in plans


@pytest.mark.parametrize("count", [0, 1, 5])
def test_one_replica_adds_up_its_ranks_channels(count: int) -> None:
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(4))

    def rank(member: ThreadMember) -> tuple[Tensor, int]:
        place = ReplicaPlace(attn_tp=4, attn_tp_rank=member.rank)
        layer, _ = network(member.rank, 4, member, member)
        return layer(x, StepTokens.of([count], place)), member.collectives

    lone = ThreadGroup([0]).member(0)
    _, whole = network(0, 1, lone, lone)
    for out, collectives in on_ranks(4, rank):
        torch.testing.assert_close(out, whole(x), rtol=1e-4, atol=1e-5)
        assert collectives == bool(count)
