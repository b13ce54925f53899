"""Stateless groups over real processes: formed at once, late, dead, and overlapping."""

from __future__ import annotations

import re
import signal
import time

from .stage import Player, Stage, stage

__all__ = ["stage"]


def start_group(stage: Stage, size: int, operations: list[list[object]]) -> list[Player]:
    """A group of ``size`` processes with a store of its own, each doing ``operations``."""
    first = stage.start("member", port=0, rank=0, world_size=size, operations=operations)
    port = first.hear("port")
    rest = [stage.start("member", port=port, rank=r, world_size=size, operations=operations) for r in range(1, size)]
    return [first, *rest]


def test_eight_processes_form_a_group(stage: Stage) -> None:
    operations: list[list[object]] = [
        ["all_gather_obj", [1, "two"]],
        ["broadcast_obj", {"from": 3}, 3],
        ["barrier", 30],
    ]
    for player in start_group(stage, 8, operations):
        assert player.result() == [[[1, "two"]] * 8, {"from": 3}, None]


def test_twenty_groups_started_at_once_do_not_meet_on_a_port(stage: Stage) -> None:
    firsts = [
        stage.start("member", port=0, rank=0, world_size=2, operations=[["all_gather_obj", f"group {number}"]])
        for number in range(20)
    ]
    ports = [first.hear("port") for first in firsts]
    assert len(set(ports)) == 20
    seconds = [
        stage.start("member", port=port, rank=1, world_size=2, operations=[["all_gather_obj", f"group {number}"]])
        for number, port in enumerate(ports)
    ]
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        assert first.result() == second.result() == [[f"group {number}"] * 2]


def test_the_others_wait_for_a_late_process(stage: Stage) -> None:
    first = stage.start("member", port=0, rank=0, world_size=3, operations=[["all_gather_obj", "here"]])
    port = first.hear("port")
    second = stage.start("member", port=port, rank=1, world_size=3, operations=[["all_gather_obj", "here"]])
    second.hear("pid")
    time.sleep(0.5)
    assert not {"done", "failed"} & (first.said.keys() | second.said.keys())
    late = stage.start("member", port=port, rank=2, world_size=3, operations=[["all_gather_obj", "late"]])
    for player in (first, second, late):
        assert player.result() == [["here", "here", "late"]]


def test_a_process_that_never_comes_is_named_by_all(stage: Stage) -> None:
    first = stage.start("member", port=0, rank=0, world_size=4, operations=[], timeout_s=2.0)
    port = first.hear("port")
    others = [stage.start("member", port=port, rank=r, world_size=4, operations=[], timeout_s=2.0) for r in (1, 3)]
    for player in (first, *others):
        kind, text = player.result()
        assert kind == "StoreError"
        # Rank 0 closes the store when it gives up: the others may end with that a moment before their own time.
        assert re.search(r"nothing from rank (\d, )*2 ", text)


def test_a_dead_process_is_named_by_those_who_wait_for_it(stage: Stage) -> None:
    store = stage.start("store")
    port = store.hear("port")
    waits: list[list[object]] = [["barrier", 30], ["say", "met"], ["barrier", 1.5]]
    survivors = [
        stage.start("member", port=port, rank=r, members=[0, 1, 2], name="dead", operations=waits) for r in (0, 1)
    ]
    doomed = stage.start(
        "member", port=port, rank=2, members=[0, 1, 2], name="dead", operations=[["barrier", 30], ["sleep", 60]]
    )
    for player in survivors:
        player.hear("reached")
    doomed.signal(signal.SIGKILL, "")
    for player in survivors:
        kind, text = player.result()
        assert kind == "StoreError"
        assert "barrier 2 of 1.1/dead: nothing from rank 2 within 1.5 s" in text


def test_groups_that_share_members_share_a_store(stage: Stage) -> None:
    port = stage.start("store").hear("port")
    groups = {"left": [0, 1, 2], "right": [2, 1, 0], "pair": [1, 2]}
    players = {
        (name, rank): stage.start(
            "member",
            port=port,
            rank=rank,
            members=members,
            name=name,
            operations=[["all_gather_obj", f"{name} {rank} {turn}"] for turn in range(5)],
        )
        for name, members in groups.items()
        for rank in members
    }
    for (name, _), player in players.items():
        assert player.result() == [[f"{name} {rank} {turn}" for rank in groups[name]] for turn in range(5)]


def test_two_that_share_a_group_form_another_with_two_more(stage: Stage) -> None:
    first = stage.start("two_groups", ports=[], rank=0)
    ports = first.hear("ports")
    players = [first, *(stage.start("two_groups", ports=ports, rank=rank) for rank in range(1, 4))]
    large = [f"large {rank}" for rank in range(4)]
    for rank, player in enumerate(players):
        small = [["small 0", "small 1"], large, ["again 0", "again 1"]]
        assert player.result() == (small if rank < 2 else [large])
