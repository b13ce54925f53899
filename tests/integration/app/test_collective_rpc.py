"""Methods that an app's own class adds to the ranks, called on all of them: real processes, two replicas."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from drumline.engine import AsyncEngine, CacheConfig, EngineConfig, ParallelConfig, SamplingParams
from drumline.engine.core.liveness import LEAST_DEADLINE_S
from drumline.engine.errors import QueueFull, StartFailed
from drumline.engine.outputs import RankReply
from tests.integration.app.conftest import WITHIN_S

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

EXTENSION = "tests.integration.app.rank_extension.Probe"


def configured(replicas: int = 2, **parallel: Any) -> EngineConfig:
    return EngineConfig(
        model="demo",
        max_model_len=512,
        cache=CacheConfig(num_gpu_blocks_override=256),
        parallel=ParallelConfig(data_parallel_size=replicas, enable_expert_parallel=replicas > 1, **parallel),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def extended() -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(configured(worker_extension_cls=EXTENSION)) as running:
        yield running


def texts(replies: list[RankReply]) -> list[str]:
    assert [(reply.rank, reply.ok, reply.value) for reply in replies] == [(0, False, None), (1, False, None)]
    return [reply.error.text for reply in replies if reply.error is not None]


async def written(engine: AsyncEngine, prompt: str, max_tokens: int) -> list[int]:
    ids: list[int] = []
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    async for output in engine.generate(prompt, params):
        ids += output.token_ids_delta
    return ids


async def test_results_come_by_rank(extended: AsyncEngine) -> None:
    replies = await extended.collective_rpc("who")
    assert [(reply.rank, reply.ok, reply.error) for reply in replies] == [(0, True, None), (1, True, None)]
    values = [reply.value for reply in replies]
    status = await extended.status()
    assert values == [{"rank": rank.rank, "pid": rank.pid} for rank in status.ranks]
    replies = await extended.collective_rpc("scale", ([1, 2.5],), {"by": 3.0})
    assert [reply.value for reply in replies] == [[3.0, 7.5], [6.0, 15.0]]


async def test_a_method_reaches_the_rank_it_extends(extended: AsyncEngine) -> None:
    about = [reply.value for reply in await extended.collective_rpc("about")]
    assert about == [[extended.model_info.vocab_size, 2]] * 2
    loads = [reply.value for reply in await extended.collective_rpc("expert_load")]
    assert all(isinstance(load, list) and load for load in loads)


async def test_an_exception_on_one_rank_is_that_ranks_alone(extended: AsyncEngine) -> None:
    first, second = await extended.collective_rpc("fail_on", (1,))
    assert (first.ok, first.value) == (True, "fine")
    assert (second.ok, second.value) == (False, None)
    error = second.error
    assert error is not None
    assert (error.kind, error.rank, error.text) == ("remote_error", 1, "LookupError: rank 1 was told to")
    assert error.incarnation == (await extended.status()).ranks[1].incarnation
    assert "rank_extension.py" in error.traceback
    assert "in fail_on" in error.traceback
    assert len(await written(extended, "After the error", 8)) == 8


async def test_arguments_are_checked_on_the_rank(extended: AsyncEngine) -> None:
    for args, field in (((["x"],), "values"), ((), "values"), (([1.0], 2.0, 3.0), "args")):
        for reply in await extended.collective_rpc("scale", args):
            assert reply.error is not None
            assert (reply.error.kind, reply.error.field) == ("invalid_request", field)
            assert "scale" in reply.error.text


@pytest.mark.parametrize("method", ["reboot", "_vocab_size", "run", "rank", "__init__", "counted"])
async def test_nothing_else_can_be_called(extended: AsyncEngine, method: str) -> None:
    for text in texts(await extended.collective_rpc(method)):
        assert f"found {method}; valid: ping, stats, about, expert_load, expert_state, fail_on" in text


async def test_results_that_cannot_travel_say_why(extended: AsyncEngine) -> None:
    assert all(".tolist()" in text for text in texts(await extended.collective_rpc("weights")))
    assert all("at most 8388608" in text for text in texts(await extended.collective_rpc("large", (9 << 20,))))


async def test_large_results_travel(extended: AsyncEngine) -> None:
    replies = await extended.collective_rpc("large", (7 << 20,), timeout=30.0)
    assert [len(reply.value) for reply in replies if isinstance(reply.value, bytes)] == [7 << 20, 7 << 20]


async def test_a_late_answer_is_never_taken_for_another(extended: AsyncEngine) -> None:
    before = (await extended.status()).counters["late_call_replies"]
    for nonce in range(3):
        late = texts(await extended.collective_rpc("nap", (0.3, nonce), timeout=0.05))
        assert all("did not answer nap within 0.05 s" in text for text in late)
    replies = await extended.collective_rpc("nap", (0.0, 77), timeout=10.0)
    assert [(reply.ok, reply.value) for reply in replies] == [(True, 77), (True, 77)]
    assert (await extended.status()).counters["late_call_replies"] == before + 6


async def test_a_method_may_take_longer_than_a_step_and_than_its_caller_waits(extended: AsyncEngine) -> None:
    await written(extended, "Past the lease of the first steps", 16)
    writing = asyncio.create_task(written(extended, "A long call", 400))
    await asyncio.sleep(0.1)
    start = time.monotonic()
    assert len(texts(await extended.collective_rpc("nap", (2 * LEAST_DEADLINE_S, 6), timeout=0.1))) == 2
    assert [reply.ok for reply in await extended.collective_rpc("who", timeout=WITHIN_S)] == [True, True]
    assert time.monotonic() - start > 1.9 * LEAST_DEADLINE_S
    assert not writing.done()
    async with asyncio.timeout(WITHIN_S):
        assert len(await writing) == 400


async def test_random_calls_disturb_no_request_and_no_call_another(extended: AsyncEngine) -> None:
    prompts = ["The quick", "import os", "In the year", "If the file"]
    alone = [await written(extended, prompt, 160) for prompt in prompts]
    draw = random.Random(4)
    done = {"ok": 0, "failed": 0, "late": 0, "full": 0}
    writing = [asyncio.create_task(written(extended, prompt, 160)) for prompt in prompts]

    async def one_caller(caller: int) -> None:
        for number in range(100):
            nonce = 1000 * caller + number
            kind = draw.choice(("nap", "nap", "late", "fail"))
            try:
                if kind == "fail":
                    rank = draw.randrange(2)
                    replies = await extended.collective_rpc("fail_on", (rank,))
                    assert [reply.ok for reply in replies] == [rank != 0, rank != 1]
                    assert replies[rank].error is not None
                    assert f"rank {rank} was told to" in replies[rank].error.text  # type: ignore[union-attr]
                    done["failed"] += 1
                    continue
                timeout = 0.002 if kind == "late" else 20.0
                replies = await extended.collective_rpc("nap", (0.004 * draw.random(), nonce), timeout=timeout)
            except QueueFull:
                done["full"] += 1
                await asyncio.sleep(0.02)
                continue
            for reply in replies:
                assert reply.value == nonce if reply.ok else kind == "late"
                done["ok" if reply.ok else "late"] += 1

    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*(one_caller(caller) for caller in range(4)))
        assert await asyncio.gather(*writing) == alone
    assert done["ok"] > 100, done
    assert done["failed"] > 20, done
    assert done["late"] > 20, done


async def test_classes_beside_the_app_are_found_by_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_app.py").write_text(
        "from drumline.workers import Worker, remote\n"
        "class Mine(Worker):\n"
        "    def __init__(self, control):\n"
        "        super().__init__(control)\n"
        "        self.calls = 0\n"
        "    def count(self, by: int = 1) -> list[int]:\n"
        "        self.calls += by\n"
        "        return [self.rank, self.calls]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    async with AsyncEngine(configured(worker_cls="beside_the_app:Mine")) as engine:
        await engine.collective_rpc("count")
        replies = await engine.collective_rpc("count", (), {"by": 4})
        assert [reply.value for reply in replies] == [[0, 5], [1, 5]]


@pytest.mark.parametrize(
    ("field", "named", "said"),
    [
        ("worker_cls", "nowhere_at_all.Mine", "No module named 'nowhere_at_all'"),
        ("worker_cls", EXTENSION, "which is no Worker"),
        ("worker_extension_cls", f"{__name__}.Shadowed", "which defines _epoch"),
    ],
)
async def test_a_class_that_cannot_be_a_rank_fails_the_start(field: str, named: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(StartFailed) as caught:
        await AsyncEngine(configured(1, **{field: named})).start()
    assert time.monotonic() - start < WITHIN_S / 2
    assert caught.value.info.field == field
    assert said in caught.value.text
    assert named in caught.value.info.found


class Shadowed:
    _epoch = 1
