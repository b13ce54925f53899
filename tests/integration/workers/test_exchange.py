"""The expert exchange and the groups under it, on real processes that talk over gloo."""

from __future__ import annotations

import pytest

from tests.integration.workers.conftest import RunRanks

WAYS = ["sockets", "memory"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 4])
def test_tokens_reach_every_rank_and_outputs_come_home_in_order(run_ranks: RunRanks, world: int, way: str) -> None:
    assert run_ranks("exchange_many_shapes", world, way) == ["equal"] * world


@pytest.mark.parametrize("way", [*WAYS, "all_to_all"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_layer_over_several_ranks_equals_the_layer_on_one(run_ranks: RunRanks, world: int, way: str) -> None:
    assert max(run_ranks("moe_layer_equals_local", world, way)) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_all_ranks_send_at_once_arrive_in_their_slots(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("experts_change_places", 3, way) == ["equal"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_counts_that_do_not_fit_are_refused_before_anything_is_sent(run_ranks: RunRanks, way: str) -> None:
    for rank, refused in enumerate(run_ranks("wrong_counts", 2, way)):
        assert refused == [
            f"rank {rank} of 2 brings 2 tokens; the step's counts are [2, 2, 2]",
            f"rank {rank} of 2 brings 2 tokens; the step's counts are [3, 3]",
        ]


@pytest.mark.parametrize("way", WAYS)
def test_abort_leaves_a_collective_within_100_ms_while_the_peer_is_stopped(run_ranks: RunRanks, way: str) -> None:
    waited, stopped = run_ranks("abort_while_peer_is_stopped", 2, way)
    assert stopped is None
    assert waited["kind"] == "epoch_aborted"
    assert waited["entered"]
    assert waited["left_ms"] < 100
    assert waited["close_ms"] < 50
    assert waited["alone"] == [[1.0, 1.0]]


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_learns_of_a_killed_peer_at_once(run_ranks: RunRanks, way: str) -> None:
    *survivors, killed = run_ranks("peer_dies", 4, way)
    assert killed is None
    assert [survivor["kind"] for survivor in survivors] == ["peer_lost"] * 3
    assert max(survivor["ms"] for survivor in survivors) < 1000
    assert "of 4" in survivors[0]["text"]


def test_a_group_that_misses_a_rank_is_given_up_at_its_deadline(run_ranks: RunRanks) -> None:
    waited, _ = run_ranks("form_without_peer", 2)
    assert waited.startswith("store: ")
    assert "nothing from rank 1 within" in waited


def test_forming_is_abandoned_when_the_epoch_ends(run_ranks: RunRanks) -> None:
    waited, _ = run_ranks("abandon_forming", 2)
    assert waited["kind"] == "epoch_aborted"
    assert waited["ms"] < 250
