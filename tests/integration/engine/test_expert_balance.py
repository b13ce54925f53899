"""The coordinator and the balance of experts: who is answered what, and what is told, shown and written down. Ranks are
simulated, and a test says what the planner answers and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from drumline.engine import balance_desk
from drumline.engine.config import EngineConfig, EPLBConfig, ParallelConfig
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.expert_records import read_load_record
from drumline.engine.layout_report.running import report_of
from drumline.protocol.messages import (
    NO_MATRIX,
    Event,
    ExpertLoad,
    ExpertLoadQuery,
    ExpertsRebalanced,
    Finished,
    I32Matrix,
    LayoutFacts,
    LayoutQuery,
    RebalanceExperts,
)
from tests.integration.engine.simulated_ranks import RawClient, SimulatedEngine, simulated

FIRST = np.tile([*range(16), 0, 1], (4, 1)).astype(np.int32)
"""Of the demo model with two redundant experts on two ranks of nine slots."""


class Planner:
    """Answers when and what a test says; until then requests wait."""

    made: Planner

    def __init__(self, deadline_s: float) -> None:
        self.requests: asyncio.Queue[tuple[PlanRequest, asyncio.Future[PlacementPlan]]] = asyncio.Queue()
        self.closed = False
        Planner.made = self

    async def plan(self, request: PlanRequest) -> PlacementPlan:
        answer: asyncio.Future[PlacementPlan] = asyncio.get_running_loop().create_future()
        self.requests.put_nowait((request, answer))
        return await answer

    async def close(self) -> None:
        self.closed = True

    async def asked(self) -> tuple[PlanRequest, asyncio.Future[PlacementPlan]]:
        async with asyncio.timeout(10.0):
            return await self.requests.get()


def moved(request: PlanRequest) -> PlacementPlan:
    """Expert 15 comes to slot 0 of layers 0 and 2 of rank 0."""
    placement = request.placement.copy()
    placement[[0, 2], 0] = 15
    moves = np.array([[0, 0, 1, 15], [2, 0, 1, 15]], dtype=np.int32)
    return PlacementPlan(request.number, placement, moves, 0.5, 0.9, 2, 200, reason="two copies are worth it")


def unchanged(request: PlanRequest) -> PlacementPlan:
    return PlacementPlan(request.number, request.placement, reason="nothing is worth moving")


@asynccontextmanager
async def balanced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **eplb: Any
) -> AsyncIterator[tuple[SimulatedEngine, Planner, RawClient]]:
    monkeypatch.setattr(balance_desk, "Planner", Planner)
    config = EPLBConfig(**{"num_redundant_experts": 2, "load_interval": 4, **eplb})
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, eplb_config=config)
    async with simulated(EngineConfig("demo", parallel=parallel), folder) as engine:
        client = engine.client()
        await client.welcome()
        yield engine, Planner.made, client
    assert Planner.made.closed


def rebalance(client: RawClient, call_id: int, placement: I32Matrix = NO_MATRIX, timeout_s: float = 60.0) -> None:
    client.dealer.send(RebalanceExperts(call_id, placement, timeout_s))


async def generated(client: RawClient, tokens: int = 40) -> None:
    await client.accepted(f"r{tokens}", tokens)
    await client.read(Finished)


async def test_experts_move_in_dummy_steps_and_who_asked_is_told_what_became_of_it(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        rebalance(client, 5)
        request, answer = await planner.asked()
        np.testing.assert_array_equal(request.placement, FIRST)
        assert (await client.status()).eplb is not None
        answer.set_result(moved(request))
        got = await client.read(ExpertsRebalanced)
        assert (got.call_id, got.error) == (5, None)
        assert got.report is not None
        assert (got.report.outcome, got.report.slots_moved, got.report.layers) == ("moved", 2, 2)
        assert got.report.moves.tolist() == [[0, 0, 0, 15], [2, 0, 0, 15]]
        held = engine.ranks[0].experts
        assert held is not None
        assert held.held[:, 0].tolist() == [15, 0, 15, 0]
        told = await client.event("rebalance")
        assert "moved" in told.text
        status = (await client.status()).eplb
        assert status is not None
        assert (status.state, status.plans, status.slots_moved) == ("idle", 1, 2)
        client.dealer.send(LayoutQuery(6))
        ranks = report_of(await client.read(LayoutFacts)).ranks
        assert ranks[0].experts[0] == (*range(1, 9), 15)
        assert ranks[1].redundant_experts[0] == (1, 15)


async def test_what_is_not_worth_it_is_told_and_nothing_is_sent(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        rebalance(client, 5)
        request, answer = await planner.asked()
        answer.set_result(unchanged(request))
        report = (await client.read(ExpertsRebalanced)).report
        assert report is not None
        assert (report.outcome, report.reason) == ("unchanged", "nothing is worth moving")
        assert engine.ranks[0].steps == 0


async def test_the_later_of_two_callers_supersedes_the_earlier(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        other = engine.client()
        await other.welcome()
        rebalance(client, 5)
        first, first_answer = await planner.asked()
        rebalance(other, 5)
        early = (await client.read(ExpertsRebalanced)).report
        assert early is not None
        assert early.outcome == "cancelled"
        second, answer = await planner.asked()
        first_answer.set_result(moved(first))
        answer.set_result(unchanged(second))
        late = (await other.read(ExpertsRebalanced)).report
        assert late is not None
        assert late.outcome == "unchanged"


async def test_of_many_callers_in_a_row_the_last_one_is_served_and_what_waits_for_the_planner_is_bounded(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (_, planner, client):
        for call_id in range(40):
            rebalance(client, call_id)
        for _ in range(39):
            report = (await client.read(ExpertsRebalanced)).report
            assert report is not None
            assert report.outcome == "cancelled"
        asked = [await planner.asked()]
        while not planner.requests.empty():
            asked.append(await planner.asked())
        wanted = [(request, answer) for request, answer in asked if not answer.cancelled()]
        assert len(wanted) <= 2  # what is being solved, and the newest
        assert [request.number for request, _ in wanted[-1:]] == [40]
        for request, answer in wanted:
            answer.set_result(unchanged(request))
        last = await client.read(ExpertsRebalanced)
        assert last.report is not None
        assert (last.call_id, last.report.outcome) == (39, "unchanged")


async def test_a_call_has_a_deadline_and_one_whose_connection_is_gone_is_forgotten(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        gone = engine.client()
        await gone.welcome()
        rebalance(gone, 9)
        first, _ = await planner.asked()
        gone.close()
        rebalance(client, 5, timeout_s=0.2)
        second, answer = await planner.asked()
        got = await client.read(ExpertsRebalanced)
        assert got.error is not None
        assert (got.call_id, got.error.retryable) == (5, True)
        assert "0.2 s" in got.error.text
        answer.set_result(moved(second))
        await client.event("rebalance")
        assert engine.coordinator.experts.next_deadline is None
        assert first.number != second.number


@pytest.mark.parametrize(
    ("placement", "timeout_s", "field"),
    [
        (FIRST[:, :-1], 60.0, "plan"),
        (FIRST + 1, 60.0, "plan"),
        (NO_MATRIX, 0.0, "timeout"),
        (NO_MATRIX, float("nan"), "timeout"),
    ],
)
async def test_a_call_that_cannot_be_served_is_refused_by_name(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, placement: I32Matrix, timeout_s: float, field: str
) -> None:
    async with balanced(runtime_root, monkeypatch) as (_, planner, client):
        rebalance(client, 5, np.ascontiguousarray(placement), timeout_s)
        error = (await client.read(ExpertsRebalanced)).error
        assert error is not None
        assert (error.kind, error.field) == ("invalid_request", field)
        assert planner.requests.empty()


async def test_without_eplb_both_calls_are_refused_by_name(runtime_root: Path) -> None:
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True)
    async with simulated(EngineConfig("demo", parallel=parallel), runtime_root) as engine:
        client = engine.client()
        await client.welcome()
        rebalance(client, 5)
        client.dealer.send(ExpertLoadQuery(6))
        errors = [(await client.read(ExpertsRebalanced)).error, (await client.read(ExpertLoad)).error]
        assert [error.field for error in errors if error is not None] == ["enable_eplb", "enable_eplb"]
        assert (await client.status()).eplb is None


async def test_load_is_counted_logged_shown_and_given_out(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with balanced(runtime_root, monkeypatch, log_balancedness=True) as (_, _, client):
        with caplog.at_level(logging.INFO, "drumline"):
            await generated(client)
        status = (await client.status()).eplb
        assert status is not None
        assert (len(status.layers), status.window_steps >= 8) == (4, True)
        assert 0.0 < status.balancedness < 1.0
        lines = [record.message for record in caplog.records if record.message.startswith("eplb: step ")]
        assert len(lines) >= 2
        assert all("balancedness=" in line and "avg_tokens=" in line for line in lines)
        client.dealer.send(ExpertLoadQuery(6))
        load = await client.read(ExpertLoad)
        assert (load.call_id, load.num_layers, load.tokens.shape) == (6, 4, (4 * len(load.steps), 16))
        # Slots of an expert's number plus one, times ten; of the first two there are two.
        once = np.array([20, 40, *range(30, 170, 10)])
        np.testing.assert_array_equal(load.tokens[0], once * (load.steps[0] // 4))


async def test_the_record_is_written_at_a_plan_and_at_the_end(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runtime_root / "load.npz"
    async with balanced(runtime_root, monkeypatch, record_path=path) as (_, planner, client):
        rebalance(client, 5)
        request, answer = await planner.asked()
        answer.set_result(unchanged(request))
        await client.read(ExpertsRebalanced)
        await generated(client)
        # Nothing had been counted when the first plan was made.
        assert not path.exists()
        rebalance(client, 6)
        _, answer = await planner.asked()
        async with asyncio.timeout(5.0):
            while not path.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        first = read_load_record(path).steps.sum()
        await generated(client, 12)
    assert read_load_record(path).steps.sum() > first
    assert read_load_record(path).physical_to_logical.tolist() == FIRST.tolist()


async def test_a_record_that_cannot_be_written_is_a_warning_and_no_fault(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runtime_root / "records"
    folder.mkdir()
    async with balanced(runtime_root, monkeypatch, record_path=folder / "load.npz") as (_, planner, client):
        folder.rmdir()
        await generated(client)
        for call_id in (5, 6):
            rebalance(client, call_id)
            request, answer = await planner.asked()
            answer.set_result(unchanged(request))
            await client.read(ExpertsRebalanced)
        warning = await client.event("warning")
        assert "load.npz cannot be written" in warning.text
        warnings = [one for one in client.seen if isinstance(one, Event) and "cannot be written" in one.text]
        assert len(warnings) == 1
        assert (await client.status()).state == "ready"


async def test_a_lost_rank_ends_the_plan_and_the_next_one_starts_from_what_is_left(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        rebalance(client, 5)
        await planner.asked()
        engine.kill(1)
        report = (await client.read(ExpertsRebalanced)).report
        assert report is not None
        assert report.outcome == "cancelled"
        await client.event("recovered")
        client.dealer.send(LayoutQuery(6))
        ranks = report_of(await client.read(LayoutFacts)).ranks
        everything = {expert for one in ranks for expert in one.experts[0]}
        assert everything == set(range(16))
        rebalance(client, 7)
        request, answer = await planner.asked()
        assert request.placement.shape[1] == request.slots.sum()
        answer.set_result(unchanged(request))
        assert (await client.read(ExpertsRebalanced)).call_id == 7


def when(condition: Callable[[], bool]) -> Any:
    async def wait() -> None:
        async with asyncio.timeout(10.0):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    return wait()


async def test_a_planner_that_fails_where_it_never_should_ends_the_engine_with_a_typed_error(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        rebalance(client, 5)
        _, answer = await planner.asked()
        answer.set_exception(RuntimeError("a mistake"))
        error = await client.engine_failure()
        assert "expert planning" in error.text
        await when(lambda: engine.run.done())


async def test_a_stage_that_does_not_come_to_an_end_is_given_up_by_a_later_call(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balanced(runtime_root, monkeypatch) as (engine, planner, client):
        experts = engine.ranks[1].experts
        assert experts is not None
        experts.mute = True
        rebalance(client, 5)
        request, answer = await planner.asked()
        answer.set_result(moved(request))
        status = await client.status_when(lambda status: status.eplb is not None and status.eplb.state == "moving")
        assert status.eplb is not None
        assert status.eplb.layers_left == 2
        rebalance(client, 6)
        first = await client.read(ExpertsRebalanced)
        assert first.report is not None
        assert (first.call_id, first.report.outcome, first.report.slots_moved) == (5, "cancelled", 0)
        request, answer = await planner.asked()
        np.testing.assert_array_equal(request.placement, FIRST)
        answer.set_result(unchanged(request))
        assert (await client.read(ExpertsRebalanced)).call_id == 6
        assert msgspec.structs.asdict(first)["error"] is None
