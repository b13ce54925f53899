"""What an app asks of the balance of experts, and what becomes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drumline.engine.errors import DrumlineError, InvalidRequest, ProtocolError, RequestFailed
from drumline.engine.expert_records import read_load_record
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    NO_MATRIX,
    NO_NUMBERS,
    ExpertLoad,
    ExpertLoadQuery,
    ExpertsRebalanced,
    RebalanceExperts,
    RebalanceReport,
)
from tests.unit.client.fake_coordinator import Served, i32, within

PLACEMENT = np.array([[0, 1, 2, 0], [2, 1, 0, 1]], dtype=np.int32)
TOKENS = np.arange(12, dtype=np.int32).reshape(4, 3)


async def test_a_rebalance_returns_the_report_of_what_became_of_it(served: Served) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.rebalance_experts())
    asked = await fake.expect(RebalanceExperts)
    assert (asked.placement.shape, asked.timeout_s) == ((0, 0), 600.0)
    report = RebalanceReport("moved", "worth it", slots_moved=3, moves=np.array([[0, 3, 0, 1]], dtype=np.int32))
    fake.send(ExpertsRebalanced(asked.call_id, report))
    got = await within(asking)
    assert (got.outcome, got.reason, got.slots_moved, got.moves.tolist()) == ("moved", "worth it", 3, [[0, 3, 0, 1]])


async def test_a_plan_of_the_apps_own_travels_as_whole_numbers(served: Served) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.rebalance_experts(PLACEMENT.tolist(), timeout=5))
    asked = await fake.expect(RebalanceExperts)
    assert (asked.placement.tolist(), asked.timeout_s) == (PLACEMENT.tolist(), 5.0)
    assert asked.placement.dtype == np.int32
    fake.send(ExpertsRebalanced(asked.call_id, error=InvalidRequest("plan", "(1, 1)", "(2, 4)").info))
    with pytest.raises(InvalidRequest, match=r"plan: found \(1, 1\)"):
        await within(asking)


@pytest.mark.parametrize("plan", [[1, 2], [[0.5]], [[]], [[-1]], [[1 << 31]], [["a"]], [[True]], [[1], [1, 2]], "x"])
async def test_a_plan_that_is_none_is_refused_before_it_travels(served: Served, plan: Any) -> None:
    engine, _ = served
    with pytest.raises(InvalidRequest) as refused:
        await within(engine.rebalance_experts(plan))
    assert refused.value.field == "plan"


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), True, "5"])
async def test_a_timeout_is_some_seconds(served: Served, timeout: Any) -> None:
    engine, _ = served
    with pytest.raises(InvalidRequest) as refused:
        await within(engine.rebalance_experts(timeout=timeout))
    assert refused.value.field == "timeout"


async def test_an_answer_without_a_report_is_a_typed_error(served: Served) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.rebalance_experts())
    fake.send(ExpertsRebalanced((await fake.expect(RebalanceExperts)).call_id))
    with pytest.raises(ProtocolError, match="without a report"):
        await within(asking)


async def test_a_rebalance_is_not_asked_for_twice_when_the_coordinator_is_lost_but_the_load_is(served: Served) -> None:
    engine, fake = served
    rebalancing = asyncio.create_task(engine.rebalance_experts())
    loading = asyncio.create_task(engine.expert_load())
    await fake.expect(RebalanceExperts)
    await fake.expect(ExpertLoadQuery)
    fake.vanish()
    following = await fake.succeeded(2)
    again = await following.expect(ExpertLoadQuery)
    with pytest.raises(RequestFailed, match="RebalanceExperts") as lost:
        await within(rebalancing)
    assert lost.value.retryable
    following.send(ExpertLoad(again.call_id, 2, i32(32, 32), TOKENS, PLACEMENT))
    assert (await within(loading)).tokens.shape == (2, 2, 3)
    await following.close()


async def test_the_load_is_saved_as_a_record_that_can_be_read(served: Served, tmp_path: Path) -> None:
    engine, fake = served
    path = tmp_path / "load.npz"
    saving = asyncio.create_task(engine.save_expert_load(path))
    fake.send(ExpertLoad((await fake.expect(ExpertLoadQuery)).call_id, 2, i32(32, 8), TOKENS, PLACEMENT))
    await within(saving)
    record = read_load_record(path)
    assert (record.steps.tolist(), record.tokens.tolist()) == ([32, 8], TOKENS.reshape(2, 2, 3).tolist())
    assert record.physical_to_logical.tolist() == PLACEMENT.tolist()


async def test_a_load_of_nothing_is_told_and_not_saved(served: Served, tmp_path: Path) -> None:
    engine, fake = served

    async def answer() -> None:
        query = await fake.expect(ExpertLoadQuery)
        fake.send(ExpertLoad(query.call_id, 2, NO_NUMBERS, NO_MATRIX, PLACEMENT))

    asking = asyncio.create_task(engine.expert_load())
    await answer()
    assert len((await within(asking)).steps) == 0
    saving = asyncio.create_task(engine.save_expert_load(tmp_path / "load.npz"))
    await answer()
    with pytest.raises(RequestFailed, match="load_interval") as none:
        await within(saving)
    assert none.value.retryable
    assert [path.name for path in tmp_path.iterdir() if "load" in path.name] == []  # noqa: ASYNC240


async def test_a_load_that_cannot_be_had_or_written_is_a_typed_error(served: Served, tmp_path: Path) -> None:
    engine, fake = served
    asking = asyncio.create_task(engine.expert_load())
    query = await fake.expect(ExpertLoadQuery)
    error = ErrorInfo(kind="invalid_request", text="enable_eplb is off", field="enable_eplb")
    fake.send(ExpertLoad(query.call_id, 0, NO_NUMBERS, NO_MATRIX, NO_MATRIX, error))
    with pytest.raises(InvalidRequest, match="enable_eplb is off"):
        await within(asking)
    saving = asyncio.create_task(engine.save_expert_load(tmp_path / "none" / "load.npz"))
    fake.send(ExpertLoad((await fake.expect(ExpertLoadQuery)).call_id, 2, i32(32, 8), TOKENS, PLACEMENT))
    with pytest.raises(DrumlineError, match="cannot be written"):
        await within(saving)
