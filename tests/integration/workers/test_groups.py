"""The operations of a group, on real processes, over shared memory and over gloo."""

from __future__ import annotations

import pytest

from tests.integration.workers.conftest import RunRanks

WAYS = ["sockets", "memory"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_operation_equals_the_plain_result(run_ranks: RunRanks, world: int, way: str) -> None:
    assert run_ranks("every_operation", world, way) == ["equal"] * world


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_many_rounds_equal_the_plain_result(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("many_rounds", 3, way) == ["equal"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_tensors_larger_than_a_mailbox_equal_the_plain_result(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("larger_than_a_mailbox", 2, way) == ["equal"] * 2


@pytest.mark.parametrize("way", WAYS)
def test_writers_do_not_overwrite_what_slow_readers_have_not_read(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("writers_wait_for_slow_readers", 3, way) == ["equal"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_messages_of_all_sizes_may_be_waited_for_in_any_order(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("messages_of_all_sizes", 2, way) == ["equal"] * 2


@pytest.mark.parametrize("way", WAYS)
def test_who_asks_for_room_first_never_waits_for_the_reader(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("room_for_messages", 2, way) == [True] * 2


def test_a_message_of_another_size_than_expected_is_refused(run_ranks: RunRanks) -> None:
    _, refused = run_ranks("a_message_of_another_size", 2, "memory")
    assert refused == "rank 0 sent 12 bytes in group messages; this one expects 8"


@pytest.mark.parametrize("way", WAYS)
def test_random_operations_in_many_rounds_equal_the_plain_result(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("random_operations", 3, way) == ["equal"] * 3


def test_operations_of_a_device_equal_the_plain_result(run_ranks: RunRanks) -> None:
    assert run_ranks("operations_of_a_device", 2) == ["equal"] * 2


def test_a_group_that_is_closed_and_dropped_unmaps_its_memory_at_once(run_ranks: RunRanks) -> None:
    assert run_ranks("a_closed_group_leaves_no_memory", 2, "memory") == [[2, 0]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_share_a_group_form_another_with_more(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("two_groups_share_members", 4, way) == [
        {"place": [0, 2, 4], "neighbours": [3, 2, 1, 2], "ends": [False, False]},
        {"place": [1, 1, 4], "neighbours": [3, 2, 3, 0], "ends": [False, False]},
        {"place": [2, 3, 4], "neighbours": [3, 2, 0, 3], "ends": [False, True]},
        {"place": [3, 0, 4], "neighbours": [3, 2, 2, 1], "ends": [True, False]},
    ]


@pytest.mark.parametrize("way", WAYS)
def test_eight_processes(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("eight_processes", 8, way) == ["equal"] * 8


@pytest.mark.parametrize("way", WAYS)
def test_torchs_default_process_group_is_never_asked_for(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("without_a_default_group", 2, way) == ["equal"] * 2


def test_hosts_are_told_apart_by_the_memory_that_ranks_share(run_ranks: RunRanks) -> None:
    assert (
        run_ranks("who_shares_a_host", 3, "memory")
        == [
            {
                "together": [1, [True, True, True], True],
                "apart": [2, [True, True, False], [False, False, True]],
                "mailboxes": False,
            }
        ]
        * 3
    )


def test_a_group_of_one_rank_opens_nothing(run_ranks: RunRanks) -> None:
    assert run_ranks("a_group_of_one_opens_nothing", 1) == ["equal"]


def test_an_unused_group_holds_one_page_of_each_mailbox(run_ranks: RunRanks) -> None:
    assert max(run_ranks("an_unused_group_holds_no_memory", 2, "memory")) <= 4


@pytest.mark.parametrize("way", WAYS)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(run_ranks: RunRanks, way: str) -> None:
    refused, *_ = run_ranks("refused_arguments", 3, way)
    assert refused == [
        "src: found rank 7; valid: 0, 1, 2 of group experts",
        "dim: found 2; valid: -2 to 1",
        "rank 0 of 3 brings 2 tokens; the step's counts are [3, 3, 3]",
        "t: found shape [2, 3]; valid: 2 dimensions, widths [4, 4, 4]",
        "dim 0: found length 2; valid: a multiple of 3",
        "counts: found [2, 2, 2]; valid: 3 that add up to 2 rows",
        "dtype: found torch.bool; valid: a number",
        "output: found shape [2, 3], splits [0, 0, 0]; valid: contiguous rows, 3 splits that add up to them",
        "dst: found this rank, 0; valid: 1, 2 of group experts",
        "connect: found False for group experts; valid: True, for messages of two ranks",
        "an object that a group does not carry: Encoding objects of type object is unsupported",
    ]
