"""An engine that balances its experts by itself: what its status, its events and its log say."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable

from drumline.engine.bench.shuffle_traffic import Traffic
from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, EPLBConfig, ParallelConfig
from drumline.engine.testing.shuffling import Shuffling
from drumline.protocol.messages import Event
from drumline.protocol.status import EplbStatus

WITHIN_S = 60.0
WINDOW = 64
EPLB = EPLBConfig(num_redundant_experts=4, window_size=WINDOW, step_interval=2 * WINDOW, load_interval=8)
BALANCED = EngineConfig(
    "demo",
    parallel=ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, eplb_config=EPLB),
)


async def eplb_when(engine: AsyncEngine, condition: Callable[[EplbStatus], bool], what: str) -> EplbStatus:
    deadline = time.monotonic() + WITHIN_S
    while True:
        eplb = (await engine.status()).eplb
        assert eplb is not None
        if condition(eplb):
            return eplb
        assert time.monotonic() < deadline, f"{what}: {eplb}"
        await asyncio.sleep(0.02)


def settled(eplb: EplbStatus) -> bool:
    """A window was counted under the placement that stands."""
    return eplb.state == "idle" and eplb.window_steps >= WINDOW // 2


async def test_balance_rises_by_itself_and_stays_when_prose_turns_to_code(runtime_root: object, mark: str) -> None:
    events: list[Event] = []
    async with AsyncEngine(BALANCED, on_event=events.append) as engine:
        traffic = Traffic(engine, streams=8, max_tokens=96, seed=1)
        running = asyncio.create_task(traffic.run())
        try:
            prose = await eplb_when(engine, lambda one: settled(one) and one.balancedness > 0.9, "prose")
            assert prose.policy == "incremental"
            assert 0.0 < prose.avg_tokens <= prose.max_tokens
            traffic.kind = "code"
            plans = prose.plans
            code = await eplb_when(
                engine, lambda one: settled(one) and one.plans > plans + 1 and one.balancedness > 0.9, "code"
            )
            assert code.slots_moved > 0
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        told = [event.text for event in events if event.kind == "rebalance"]
        assert any("moved" in text for text in told), told
        assert not [event for event in events if event.kind in ("fault", "warning")]


async def test_experts_move_while_nothing_runs_and_then_nothing_is_done(runtime_root: object, mark: str) -> None:
    async with AsyncEngine(BALANCED) as engine:
        shuffling = await Shuffling.of(engine)
        report = await shuffling.once()
        layers, slots = shuffling.home.shape
        assert (report.outcome, report.layers) == ("moved", layers)
        assert report.slots_moved == len(report.moves) > layers * slots // 2
        assert report.bytes_moved > 0
        for layer, slot, old, new in report.moves.tolist():
            assert (shuffling.home[layer, slot], shuffling.away[layer, slot]) == (old, new)
        load = await engine.expert_load()
        assert (load.physical_to_logical == shuffling.away).all()
        again = await engine.rebalance_experts(shuffling.away)
        assert (again.outcome, again.slots_moved, again.bytes_moved) == ("unchanged", 0, 0)
        status = await engine.status()
        steps = status.groups[0].step
        await asyncio.sleep(0.3)
        status = await engine.status()
        assert status.groups[0].step == steps
        assert status.groups[0].wave_state == "paused"


def test_lines_of_balance_go_to_stderr(mark: str) -> None:
    command = [sys.executable, "-c", "from drumline.engine.cli import main; main()", "generate", "--model", "demo"]
    flags = ["-dp", "2", "--enable-expert-parallel", "--enable-eplb", "--eplb-log-balancedness"]
    request = ["--eplb-load-interval", "8", "--prompt", "The", "--max-tokens", "48", "--ignore-eos", "--json"]
    done = subprocess.run([*command, *flags, *request], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"eplb: step \d+: avg_tokens=([\d.]+), max_tokens=([\d.]+), balancedness=([\d.]+)", done.stderr)
    assert len(lines) >= 3, done.stderr
    for average, most, balance in lines:
        assert 0 < float(average) <= float(most)
        assert 0 < float(balance) <= 1
    assert "eplb:" not in done.stdout
