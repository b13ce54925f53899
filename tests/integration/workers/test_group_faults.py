"""Groups with a rank that dies, stops, is late or leaves, on real processes, over shared memory and over gloo."""

from __future__ import annotations

import pytest

from tests.integration.workers.conftest import RunRanks

WAYS = ["sockets", "memory"]
OPERATIONS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier", "recv"]


@pytest.mark.parametrize("way", WAYS)
def test_every_operation_ends_at_once_when_a_rank_is_killed(run_ranks: RunRanks, way: str) -> None:
    *survivors, killed = run_ranks("killed_in_the_middle", 3, way)
    assert killed is None
    for rank, outcomes in enumerate(survivors):
        assert {name: outcomes[name]["kind"] for name in OPERATIONS} == dict.fromkeys(OPERATIONS, "peer_lost")
        assert max(outcome["ms"] for outcome in outcomes.values()) < 1000
        for name in OPERATIONS:
            assert outcomes[name]["text"].startswith(f"group {name}, rank {rank} (position {rank} of 3), collective ")
            assert " of step -1: waited for rank" in outcomes[name]["text"]


@pytest.mark.parametrize("way", WAYS)
def test_every_operation_is_left_within_100_ms_while_a_rank_is_stopped(run_ranks: RunRanks, way: str) -> None:
    waited, stopped = run_ranks("abort_while_stopped", 2, way)
    assert stopped is None
    assert waited.pop("threads") == {"left": []}
    assert {name: outcome["kind"] for name, outcome in waited.items()} == dict.fromkeys(OPERATIONS, "epoch_aborted")
    assert max(outcome["left_ms"] for outcome in waited.values()) < 100
    assert max(outcome["close_ms"] for outcome in waited.values()) < 50


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_comes_late_is_waited_for(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("a_peer_comes_late", 3, way) == [{"failed": False}] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_deadline_ends_the_wait_and_names_the_rank_that_did_not_come(run_ranks: RunRanks, way: str) -> None:
    for outcomes in run_ranks("a_peer_never_comes", 3, way)[:2]:
        for name, deadline_ms in (("all_reduce", 300), ("barrier", 200), ("recv", 300)):
            assert outcomes[name]["kind"] == "group_timeout"
            assert deadline_ms <= outcomes[name]["ms"] < deadline_ms + 150
        assert "waited for rank 2: nothing within 0.2 s" in outcomes["barrier"]["text"]
        assert "waited for rank 2: it did not end within 0.3 s" in outcomes["recv"]["text"]
        assert "2: it did not end within 0.3 s" in outcomes["all_reduce"]["text"]
        assert outcomes["not connected"]["kind"] == "group_timeout"
        assert 180 <= outcomes["not connected"]["ms"] < 1000
        assert "from rank 2 within 0.2 s" in outcomes["not connected"]["text"] or way == "memory"


@pytest.mark.parametrize("way", WAYS)
def test_more_than_64_unfinished_sends_wait_for_the_oldest(run_ranks: RunRanks, way: str) -> None:
    sender, _ = run_ranks("sends_are_bounded", 2, way)
    assert sender["before_ms"] < 300
    assert sender["after_ms"] > 350


@pytest.mark.parametrize("way", WAYS)
def test_what_was_sent_arrives_although_its_group_is_closed(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("close_lets_messages_out", 2, way) == [{"left": []}] * 2


@pytest.mark.parametrize("way", WAYS)
def test_closing_ends_the_receives_that_nothing_came_for(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("close_ends_what_is_expected", 2, way) == [{"left": [], "after": "epoch_aborted"}] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_gives_its_group_up_keeps_nobody_waiting(run_ranks: RunRanks, way: str) -> None:
    outcomes = run_ranks("abort_is_seen_by_all", 4, way)
    assert [outcome["kind"] for outcome in outcomes] == ["peer_lost"] * 4
    assert max(outcome["ms"] for outcome in outcomes) < 1000
