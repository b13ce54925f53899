"""Whose tokens are whose in a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.protocol.layout import Layout
from drumline.workers.step_tokens import ReplicaPlace, StepTokens


def test_a_place_follows_from_the_layout() -> None:
    layout = Layout(2, 2, 4, attention_data_parallel_size=2)
    # Rank 13: dp 1, pp 1, tp 1: the second rank of the first attention replica.
    assert ReplicaPlace.of(layout, 13, lockstep=True) == ReplicaPlace(2, 2, 0, 2, 2, 1)
    assert ReplicaPlace.of(layout, 14, lockstep=True) == ReplicaPlace(3, 2, 1, 2, 2, 0)
    # Alone, an engine replica's steps count its own attention replicas only.
    assert ReplicaPlace.of(layout, 14, lockstep=False) == ReplicaPlace(1, 0, 1, 2, 2, 0)


def test_ranks_of_a_replica_share_out_its_tokens() -> None:
    place = ReplicaPlace(replica=1, first=1, attn_tp=4, attn_tp_rank=1)
    tokens = StepTokens.of([3, 6], place)
    assert (tokens.own, tokens.share, tokens.gathered) == (6, (2, 4), None)
    assert tokens.shares == [2, 2, 1, 1]
    assert tokens.by_rank == [1, 1, 1, 0, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("counts", "rows", "padded"),
    [
        ([5, 3, 4, 4], (2, 2, 2, 2), False),
        ([5, 3, 3, 1], (2, 2, 2, 2), True),
        ([9, 9, 12, 0], (6, 6, 6, 6), True),
        ([9, 9, 1, 0], (1, 0, 0, 0), False),
        ([9, 9, 0, 0], (0, 0, 0, 0), False),
    ],
)
def test_attention_replicas_of_the_own_engine_replica_are_gathered(
    counts: list[int], rows: tuple[int, ...], padded: bool
) -> None:
    gathered = StepTokens.of(counts, ReplicaPlace(2, 2, 0, 2, 2, 1)).gathered
    assert gathered is not None
    assert gathered.rows == rows
    assert gathered.padded == padded
    assert sum(gathered.tokens) == sum(counts[2:])


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(SIZES, st.data())
def test_the_shares_of_all_ranks_are_the_tokens_once_each(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    dp, attn_dp, attn_tp = sizes
    layout = Layout(dp, 1, attn_dp * attn_tp, attention_data_parallel_size=attn_dp)
    counts = data.draw(st.lists(st.integers(0, 20), min_size=dp * attn_dp, max_size=dp * attn_dp))
    covered: dict[int, list[int]] = {replica: [] for replica in range(len(counts))}
    for position, rank in enumerate(layout.expert_group(0)):
        place = ReplicaPlace.of(layout, rank, lockstep=True)
        tokens = StepTokens.of(counts, place)
        assert tokens.own == counts[place.replica]
        start, end = tokens.share
        covered[place.replica].extend(range(start, end))
        # Every rank says the same of all: collectives agree on their shapes.
        assert tokens.by_rank[position] == end - start == tokens.shares[place.attn_tp_rank]
        assert sum(tokens.by_rank) == sum(counts)
        if tokens.gathered is not None:
            assert tokens.gathered.tokens[layout.coordinates(rank).tp_rank] == end - start
    assert covered == {replica: list(range(count)) for replica, count in enumerate(counts)}
