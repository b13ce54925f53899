"""A mixture of experts: by its definition on one rank, and over ranks as on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.modelspec import MoeSpec
from drumline.protocol.shards import split
from drumline.workers.experts.all_to_all import AllToAllExchange
from drumline.workers.layers import (
    ExpertExchange,
    GatedMlp,
    LocalExperts,
    ModelGroups,
    MoeLayer,
    ParallelMlp,
    RoutingView,
    SoftmaxGate,
)
from drumline.workers.step_tokens import ReplicaPlace, StepTokens
from tests.parity.threadexchange import ThreadExchange
from tests.parity.threadgroup import ThreadGroup, ThreadMember
from tests.unit.workers.threads import model_groups, on_ranks

HIDDEN, WIDTH, EXPERTS, TOP_K = 8, 12, 6, 3
MOE = MoeSpec(EXPERTS, TOP_K, WIDTH, norm_topk_prob=True, layers=(0,))
# Expert e is in slot SLOTS[e]; slots are spread over the ranks in runs.
SLOTS = torch.tensor([3, 0, 5, 1, 4, 2])
CPU = torch.device("cpu")
Exchange = Callable[[ThreadMember], ExpertExchange]


class Weights:
    """Those of a whole layer, by slot."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.router = torch.randn(EXPERTS, HIDDEN, generator=generator)
        self.gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
        self.down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)
        self.shared_gate_up = torch.randn(2 * WIDTH, HIDDEN, generator=generator)
        self.shared_down = torch.randn(HIDDEN, WIDTH, generator=generator)

    def to(self, dtype: torch.dtype) -> Weights:
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(dtype))
        return self


def tokens_of(replica: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(100 * replica + count)).to(dtype)


def routing(first: int, end: int, ranks: int) -> RoutingView:
    owners = torch.repeat_interleave(torch.arange(ranks), torch.tensor([len(range(*run)) for run in runs(ranks)]))
    return RoutingView(SLOTS, owners, first, end)


def runs(ranks: int) -> list[tuple[int, int]]:
    return [split(EXPERTS, ranks, rank) for rank in range(ranks)]


def whole_layer(weights: Weights, *, shared: bool = False) -> MoeLayer:
    experts = LocalExperts(weights.gate_up, weights.down)
    mlp = ParallelMlp(GatedMlp(weights.shared_gate_up, weights.shared_down), ModelGroups()) if shared else None
    gate = SoftmaxGate(weights.router, MOE)
    return MoeLayer(gate, experts, routing(0, EXPERTS, 1), ModelGroups(), mlp, sharded=False)


def alone(count: int) -> StepTokens:
    return StepTokens.of([count], ReplicaPlace())


@pytest.mark.parametrize("shared", [False, True])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(shared: bool) -> None:
    weights, x = Weights(), tokens_of(0, 11)
    layer = whole_layer(weights, shared=shared)
    found = layer(x, alone(11))
    counted = torch.zeros(EXPERTS, dtype=torch.int64)
    for token in range(11):
        probabilities = (weights.router @ x[token]).softmax(-1)
        best, chosen = probabilities.topk(TOP_K)
        total = torch.zeros(HIDDEN)
        if shared:
            gate, up = (weights.shared_gate_up @ x[token]).chunk(2)
            total += weights.shared_down @ (torch.nn.functional.silu(gate) * up)
        for weight, expert in zip(best / best.sum(), chosen.tolist(), strict=True):
            slot = int(SLOTS[expert])
            counted[slot] += 1
            gate, up = (weights.gate_up[slot] @ x[token]).chunk(2)
            total += weight * (weights.down[slot] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(found[token], total, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.experts.load, counted)


def test_no_token_costs_nothing_and_counts_nothing() -> None:
    layer = whole_layer(Weights(), shared=True)
    assert layer(tokens_of(0, 0), alone(0)).shape == (0, HIDDEN)
    assert int(layer.experts.load.sum()) == 0


def sharded_rank(member: ThreadMember, attn_tp: ThreadMember, tp: ThreadMember, dtype: torch.dtype) -> MoeLayer:
    """A layer with this rank's channels of every expert, over the group of ``member``."""
    weights, ranks = Weights().to(dtype), member.world_size
    start, end = split(WIDTH, ranks, member.rank_in_group)
    gate_up = torch.cat([weights.gate_up[:, start:end], weights.gate_up[:, WIDTH + start : WIDTH + end]], dim=1)
    groups = model_groups(member, attn_tp=attn_tp)
    groups.tp = tp
    first, last = split(WIDTH, tp.world_size, tp.rank_in_group)
    part = torch.cat([weights.shared_gate_up[first:last], weights.shared_gate_up[WIDTH + first : WIDTH + last]])
    shared = ParallelMlp(GatedMlp(part, weights.shared_down[:, first:last].contiguous()), groups)
    experts = LocalExperts(gate_up.contiguous(), weights.down[:, :, start:end].contiguous())
    gate = SoftmaxGate(weights.router, MOE)
    # Every rank has every slot.
    return MoeLayer(gate, experts, routing(0, EXPERTS, 1), groups, shared, sharded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5], [1], [0], [4, 7], [0, 3], [1, 0], [1, 1]])
@pytest.mark.parametrize("tp", [1, 2])
def test_sharded_experts_give_what_whole_ones_give(dtype: torch.dtype, counts: list[int], tp: int) -> None:
    ranks = len(counts) * tp
    replicas = [ThreadGroup(range(first, first + tp)) for first in range(0, ranks, tp)]

    def rank(member: ThreadMember) -> Tensor:
        replica, place = divmod(member.rank, tp)
        own = replicas[replica].member(member.rank)
        layer = sharded_rank(member, own, own, dtype)
        step = StepTokens.of(counts, ReplicaPlace(replica, replica, attn_tp=tp, attn_tp_rank=place))
        return layer(tokens_of(replica, counts[replica], dtype), step)

    whole = whole_layer(Weights().to(dtype), shared=True)
    reference = whole_layer(Weights().to(dtype).to(torch.float32), shared=True)
    for number, found in enumerate(on_ranks(ranks, rank)):
        replica = number // tp
        count = counts[replica]
        assert found.dtype == dtype
        if dtype == torch.float32:
            expected = whole(tokens_of(replica, count), alone(count))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            continue
        # Routing in bfloat16 may differ from float32; where it does not, the error is that of a few roundings.
        exact = reference(tokens_of(replica, count, dtype).float(), alone(count))
        assert (found.float() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("counts", [[3], [2, 1]])
def test_partial_sums_of_sharded_experts_travel_in_float32(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[torch.dtype] = []
    all_reduce = ThreadMember.all_reduce

    def recorded(member: ThreadMember, t: Tensor) -> Tensor:
        summed.append(t.dtype)
        return all_reduce(member, t)

    monkeypatch.setattr(ThreadMember, "all_reduce", recorded)
    tp = 2 // len(counts)
    replicas = [ThreadGroup(range(first, first + tp)) for first in range(0, 2, tp)]

    def rank(member: ThreadMember) -> torch.dtype:
        replica, place = divmod(member.rank, tp)
        layer = sharded_rank(member, replicas[replica].member(member.rank), member, torch.bfloat16)
        layer.shared = None
        step = StepTokens.of(counts, ReplicaPlace(replica, replica, attn_tp=tp, attn_tp_rank=place))
        return layer(tokens_of(replica, counts[replica], torch.bfloat16), step).dtype

    assert on_ranks(2, rank) == [torch.bfloat16] * 2
    assert summed == [torch.float32] * 2


def spread_layer(counts: list[int], tp: int, make: Exchange, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Outputs and load of each rank of a layer whose experts are spread over all of them."""
    ranks = len(counts) * tp
    replicas = [ThreadGroup(range(first, first + tp)) for first in range(0, ranks, tp)]

    def rank(member: ThreadMember) -> tuple[Tensor, Tensor]:
        weights = Weights().to(dtype)
        first, end = runs(ranks)[member.rank]
        replica, place = divmod(member.rank, tp)
        experts = LocalExperts(weights.gate_up[first:end].contiguous(), weights.down[first:end].contiguous())
        groups = model_groups(member, attn_tp=replicas[replica].member(member.rank))
        gate = SoftmaxGate(weights.router, MOE)
        layer = MoeLayer(gate, experts, routing(first, end, ranks), groups, None, sharded=False)
        layer.exchange = make(member)
        step = StepTokens.of(counts, ReplicaPlace(replica, replica, attn_tp=tp, attn_tp_rank=place))
        return layer(tokens_of(replica, counts[replica], dtype), step), experts.load

    return on_ranks(ranks, rank)


def all_to_all(member: ThreadMember) -> ExpertExchange:
    return AllToAllExchange(member, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("counts", "tp"),
    [([3, 5], 1), ([0, 4], 1), ([1, 0], 1), ([2, 0, 7, 1], 1), ([1], 4), ([0], 4), ([5, 0], 2), ([1, 3], 2)],
)
def test_all_to_all_gives_the_bits_of_gathering_and_both_what_one_rank_gives(
    counts: list[int], tp: int, dtype: torch.dtype
) -> None:
    gathering = spread_layer(counts, tp, ThreadExchange, dtype)
    direct = spread_layer(counts, tp, all_to_all, dtype)
    whole = whole_layer(Weights().to(dtype))
    expected = [whole(tokens_of(replica, count, dtype), alone(count)) for replica, count in enumerate(counts)]
    for number, ((gathered, load), (sent, other_load)) in enumerate(zip(gathering, direct, strict=True)):
        assert torch.equal(gathered, sent)
        assert torch.equal(load, other_load)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(sent, expected[number // tp], rtol=tolerance, atol=tolerance)
    # Each token is computed once, however many ranks hold it.
    assert torch.equal(torch.cat([load for _, load in direct]), whole.experts.load)


@pytest.mark.parametrize(("announced", "names"), [(3, "rank 1 announces 3 rows"), (-1, "rank 1 announces -1 rows")])
def test_a_rank_that_announces_an_impossible_number_of_rows_is_named(announced: int, names: str) -> None:
    def rank(member: ThreadMember) -> str:
        if member.rank == 1:
            # A rank with 2 tokens that says it sends another number to everyone.
            sizes = torch.full((2, 1), announced, dtype=torch.int32)
            member.all_to_all(torch.empty_like(sizes), sizes, [1, 1], [1, 1])
            return ""
        slots = torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(ProtocolError) as caught:
            all_to_all(member).dispatch(torch.zeros(2, 4), slots, slots.view(-1), [2, 2])
        return caught.value.text

    assert on_ranks(2, rank)[0] == f"{names} of its 2 tokens"


@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 2]])
def test_counts_that_do_not_fit_are_refused_before_anyone_is_waited_for(counts: list[int]) -> None:
    member = ThreadGroup([0, 1]).member(0)
    slots = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ProtocolError, match="rank 0 of 2 brings 2 tokens"):
        all_to_all(member).dispatch(torch.zeros(2, 4), slots, slots.view(-1), counts)
    assert member.collectives == 0


def test_a_token_goes_once_to_a_rank_with_several_of_its_experts() -> None:
    def rank(member: ThreadMember) -> int:
        slots = torch.tensor([[0, 1, 2], [0, 1, 2]])
        owners = torch.zeros(6, dtype=torch.int64)
        hidden, _ = all_to_all(member).dispatch(torch.ones(2, 4), slots, owners, [2, 2])
        return len(hidden)

    assert on_ranks(2, rank) == [4, 0]
