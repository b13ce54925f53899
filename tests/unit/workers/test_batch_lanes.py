"""Rows of several lanes in one table: a row computes in steps of its own lane only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Admit, SamplingSpec, Step
from drumline.workers.batch import BatchTable, StepRows


def int32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def admit(row: int, lane: int, length: int = 2) -> Admit:
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    return Admit(row, tokens, length, 0, int32(2 * row, 2 * row + 1), SamplingSpec(), lane)


def step(lane: int, named: dict[int, int] | None = None, *admitted: Admit, evicted: tuple[int, ...] = ()) -> Step:
    named = named or {}
    return Step(
        term=1,
        epoch=1,
        wave=1,
        step=1,
        num_tokens_across_dp=int32(0),
        evicted=int32(*evicted),
        admitted=admitted,
        append_rows=int32(),
        append_blocks=int32(),
        prefill_rows=int32(*named),
        prefill_counts=int32(*named.values()),
        lane=lane,
    )


def run(table: BatchTable, this: Step, *sampled: int) -> StepRows:
    plan = table.apply(this)
    table.advance(plan, torch.tensor(sampled) if sampled else None)
    return plan


@pytest.fixture
def table() -> BatchTable:
    """Rows 0 and 2 decode in lane 0, row 1 in lane 1."""
    table = BatchTable(4, 8, num_blocks=20, block_size=4, vocab_size=200, device=torch.device("cpu"))
    run(table, step(0, {0: 2, 2: 2}, admit(0, 0), admit(1, 1), admit(2, 0)), 50, 52)
    run(table, step(1, {1: 2}), 51)
    return table


def test_unnamed_rows_decode_in_steps_of_their_lane(table: BatchTable) -> None:
    plan = run(table, step(0), 60, 62)
    assert plan.rows.tolist() == [0, 2]
    plan = table.apply(step(1))
    assert (plan.rows.tolist(), table.input_ids(plan).tolist()) == ([1], [51])


def test_a_lane_without_rows_computes_nothing(table: BatchTable) -> None:
    assert table.apply(step(2)).num_tokens == 0


def test_a_row_is_admitted_in_a_step_of_another_lane_and_waits_for_its_own(table: BatchTable) -> None:
    assert run(table, step(0, None, admit(3, 1)), 60, 62).rows.tolist() == [0, 2]
    assert run(table, step(1, {3: 2}), 61, 70).rows.tolist() == [1, 3]


def test_a_named_row_of_another_lane_is_refused(table: BatchTable) -> None:
    with pytest.raises(ProtocolError, match="row 3 of lane 1 shall compute in a step of lane 0"):
        table.apply(step(0, {3: 2}, admit(3, 1)))
    with pytest.raises(ProtocolError, match="row 1 of lane 1 shall compute in a step of lane 0"):
        table.apply(step(0, {1: 1}))


def test_a_row_of_another_lane_may_be_told_to_wait(table: BatchTable) -> None:
    assert table.apply(step(0, {1: 0, 2: 0})).rows.tolist() == [0]


def test_a_row_that_is_admitted_anew_has_its_new_lane(table: BatchTable) -> None:
    plan = run(table, step(1, {0: 2}, admit(0, 1), evicted=(0,)), 80, 61)
    assert plan.rows.tolist() == [1, 0]
    assert table.apply(step(0)).rows.tolist() == [2]
