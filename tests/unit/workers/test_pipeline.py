"""Tokens that come back to the first stage reach the rows that sampled them, in the order of the steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from drumline.workers.batch import BatchTable
from drumline.workers.pipeline import Pipeline
from tests.parity.threadgroup import ThreadGroup


@pytest.fixture
def stages() -> Callable[[int], Pipeline]:
    hidden, tokens = ThreadGroup([0, 4, 8]), ThreadGroup([0, 4, 8])
    return lambda rank: Pipeline(hidden.member(rank), tokens.member(rank))


@pytest.fixture
def table() -> BatchTable:
    return BatchTable(6, 32, num_blocks=20, block_size=4, vocab_size=200, device=torch.device("cpu"))


def rows(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


def test_a_stage_knows_its_place_and_its_neighbours(stages: Callable[[int], Pipeline]) -> None:
    first, middle, last = stages(0), stages(4), stages(8)
    assert [(stage.is_first, stage.is_last) for stage in (first, middle, last)] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    x = torch.randn(3, 5)
    first.send_hidden(x)
    passed = middle.receive_hidden(3, 5, torch.float32)
    middle.send_hidden(passed + 1)
    assert torch.equal(last.receive_hidden(3, 5, torch.float32), x + 1)


def test_hidden_states_of_several_steps_keep_their_order(stages: Callable[[int], Pipeline]) -> None:
    first, middle = stages(0), stages(4)
    for step in range(3):
        first.send_hidden(torch.full((step + 1, 2), float(step)).bfloat16())
    for step in range(3):
        assert float(middle.receive_hidden(step + 1, 2, torch.bfloat16).sum()) == 2 * step * (step + 1)


def test_taking_a_lane_takes_what_was_sampled_before_it_too(
    stages: Callable[[int], Pipeline], table: BatchTable
) -> None:
    first, last = stages(0), stages(8)
    for lane, of_lane, tokens in ((0, rows(0, 3), [10, 13]), (1, rows(1), [11]), (2, rows(2), [12])):
        first.expect_tokens(lane, of_lane)
        last.send_tokens(torch.tensor(tokens))
    first.take_tokens(1, table)
    assert table.last_token.tolist() == [10, 11, 0, 13, 0, 0]
    # The newest of the lane has come: asking again waits for nothing.
    first.take_tokens(1, table)
    first.take_tokens(0, table)
    assert table.last_token.tolist() == [10, 11, 0, 13, 0, 0]
    first.take_tokens(2, table)
    assert table.last_token.tolist() == [10, 11, 12, 13, 0, 0]


def test_a_lane_takes_all_its_steps(stages: Callable[[int], Pipeline], table: BatchTable) -> None:
    first, last = stages(0), stages(8)
    for token in (20, 21, 22):
        first.expect_tokens(0, rows(5))
        last.send_tokens(torch.tensor([token]))
    first.take_tokens(0, table)
    assert int(table.last_token[5]) == 22


def test_a_row_that_changed_hands_ends_with_the_token_of_its_newest_step(
    stages: Callable[[int], Pipeline], table: BatchTable
) -> None:
    first, last = stages(0), stages(8)
    # Row 2 sampled in lane 0, was evicted and admitted anew into lane 1, and sampled there.
    for lane, token in ((0, 50), (1, 60)):
        first.expect_tokens(lane, rows(2))
        last.send_tokens(torch.tensor([token]))
    first.take_tokens(1, table)
    assert int(table.last_token[2]) == 60
    # Nothing is left that could overwrite it.
    first.take_tokens(0, table)
    assert int(table.last_token[2]) == 60
