"""An app that embeds the engine: real processes, the demo model, one replica."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from drumline.engine import AsyncEngine, EngineConfig, FaultConfig, ParallelConfig, RequestOutput, SamplingParams
from drumline.engine.errors import (
    DuplicateRequest,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    RequestFailed,
    StartFailed,
)
from tests.integration.app.conftest import WITHIN_S, idle, status_when

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

PROMPT = 'The "with" statement is used to'
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


async def outputs(engine: AsyncEngine, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Any:
    async with asyncio.timeout(WITHIN_S):
        return [out async for out in engine.generate(prompt, params, **options)]


async def rest(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [out async for out in stream]


def left_over(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def names_in(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


async def last(engine: AsyncEngine, prompt: Any = PROMPT, **sampling: Any) -> RequestOutput:
    result: RequestOutput = (await outputs(engine, prompt, SamplingParams(**{**GREEDY, **sampling})))[-1]
    return result


async def test_text_streams_as_deltas_that_join_to_the_whole(engine: AsyncEngine) -> None:
    outs = await outputs(engine, PROMPT, SamplingParams(**GREEDY), request_id="r1")
    end = outs[-1]
    assert "".join(out.text_delta for out in outs) == end.text
    assert [token for out in outs for token in out.token_ids_delta] == end.token_ids
    assert len(end.token_ids) == 24
    assert (end.request_id, end.index, end.prompt, end.finish_reason) == ("r1", 0, PROMPT, "length")
    assert [out.finished for out in outs].count(True) == 1
    assert engine.tokenizer is not None
    assert end.text == engine.tokenizer.decode(end.token_ids)


async def test_a_prompt_as_text_and_as_token_ids_gives_the_same(engine: AsyncEngine) -> None:
    of_text = await last(engine)
    of_ids = await last(engine, of_text.prompt_token_ids)
    assert of_ids.token_ids == of_text.token_ids
    assert of_ids.prompt is None


async def test_max_tokens_none_goes_up_to_the_context(engine: AsyncEngine) -> None:
    end = await last(engine, max_tokens=None)
    assert len(end.prompt_token_ids) + len(end.token_ids) == 128
    assert end.finish_reason == "length"


async def test_a_stop_string_ends_the_text_before_it(engine: AsyncEngine) -> None:
    whole = await last(engine)
    stop = whole.text[10:16]
    cut = whole.text[: whole.text.index(stop)]
    end = await last(engine, stop=stop)
    assert (end.text, end.finish_reason, end.stop_reason) == (cut, "stop", stop)
    assert end.token_ids == whole.token_ids[: len(end.token_ids)]
    kept = await last(engine, stop=[stop], include_stop_str_in_output=True)
    assert kept.text == cut + stop
    assert idle(await status_when(engine, idle))


async def test_a_stop_token_ends_the_sequence_and_has_no_text(engine: AsyncEngine) -> None:
    whole = await last(engine)
    stop = whole.token_ids[8]
    at = whole.token_ids.index(stop)
    end = await last(engine, stop_token_ids=[stop])
    assert (end.finish_reason, end.stop_reason) == ("stop", stop)
    assert end.token_ids == whole.token_ids[: at + 1]
    assert engine.tokenizer is not None
    assert end.text == engine.tokenizer.decode(whole.token_ids[:at])


async def test_n_sequences_are_told_apart_and_a_seed_repeats_them(engine: AsyncEngine) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
    runs = []
    for _ in range(2):
        outs = await outputs(engine, PROMPT, params)
        runs.append({out.index: out.token_ids for out in outs if out.finished})
        assert [out.finished for out in outs].count(True) == 3
    assert runs[0] == runs[1]
    assert sorted(runs[0]) == [0, 1, 2]
    assert len({tuple(ids) for ids in runs[0].values()}) > 1


async def test_logprobs_of_greedy_tokens_are_the_best(engine: AsyncEngine) -> None:
    end = await last(engine, logprobs=2, max_tokens=4)
    assert end.logprobs is not None
    for token, position in zip(end.token_ids, end.logprobs, strict=True):
        assert position[token].rank == 1
        assert len(position) == 2
        assert all(entry.logprob <= 0.0 for entry in position.values())


async def test_many_requests_side_by_side_each_get_their_own_text(engine: AsyncEngine) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(12)]
    alone = [(await last(engine, prompt, max_tokens=6)).token_ids for prompt in prompts[:3]]
    together = await asyncio.gather(*(last(engine, prompt, max_tokens=6) for prompt in prompts))
    assert [out.token_ids for out in together[:3]] == alone
    assert [out.prompt for out in together] == prompts


async def test_an_app_that_blocks_its_loop_loses_nothing(engine: AsyncEngine) -> None:
    whole = await last(engine, max_tokens=100)
    outs: list[RequestOutput] = []
    async for out in engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": 100})):
        if not outs:
            time.sleep(1.5)  # noqa: ASYNC251
        outs.append(out)
    assert "".join(out.text_delta for out in outs) == whole.text
    assert outs[-1].token_ids == whole.token_ids


async def test_leaving_the_loop_frees_the_blocks(engine: AsyncEngine) -> None:
    async for _ in engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": None}), request_id="left"):
        break
    await status_when(engine, idle)


async def test_the_id_of_a_request_that_was_left_can_be_used_again(engine: AsyncEngine) -> None:
    async for _ in engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": None}), request_id="again"):
        break
    outs = await outputs(engine, PROMPT, SamplingParams(max_tokens=1), request_id="again")
    assert outs[-1].finished


async def test_cancel_returns_once_the_blocks_are_free_and_the_reader_sees_abort(engine: AsyncEngine) -> None:
    started = asyncio.Event()

    async def read() -> RequestOutput | None:
        end = None
        async for out in engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": None}), request_id="c"):
            started.set()
            end = out
        return end

    reader = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), WITHIN_S)
    await engine.cancel("c")
    assert idle(await engine.status())
    end = await asyncio.wait_for(reader, WITHIN_S)
    assert end is not None
    assert (end.finish_reason, end.finished) == ("abort", True)
    await engine.cancel("c")


async def test_a_live_id_is_refused(engine: AsyncEngine) -> None:
    running = engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": 100}), request_id="live")
    await anext(running)
    with pytest.raises(DuplicateRequest, match="live"):
        await outputs(engine, PROMPT, request_id="live")
    await running.aclose()


@pytest.mark.parametrize(
    ("prompt", "figures"),
    [
        ([], ["prompt"]),
        ("", ["prompt"]),
        ([5] * 300, ["300", "128"]),
        ([2048], ["2048", "2047"]),
        ([-1], ["-1"]),
    ],
)
async def test_a_bad_prompt_is_refused_with_the_figures(engine: AsyncEngine, prompt: Any, figures: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await outputs(engine, prompt)
    for figure in figures:
        assert figure in caught.value.text


async def test_ranks_answer_control_calls(engine: AsyncEngine) -> None:
    (reply,) = await engine.collective_rpc("ping")
    assert (reply.rank, reply.ok, reply.error) == (0, True, None)
    (reply,) = await engine.collective_rpc("stats", timeout=2.0)
    assert reply.ok
    (reply,) = await engine.collective_rpc("reboot")
    assert not reply.ok
    assert reply.error is not None
    assert "reboot" in reply.error.text


async def test_closing_ends_a_running_request_and_leaves_nothing() -> None:
    events: list[str] = []
    engine = AsyncEngine(EngineConfig(model="demo"), on_event=lambda event: events.append(event.kind))
    async with engine:
        status = await engine.status()
        pids = [rank.pid for rank in status.ranks] + [status.supervisor.pid, status.coordinator.pid]
        assert engine._local is not None
        folder = Path(engine._local.runtime_dir)
        running = engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": 100}))
        await anext(running)
    with pytest.raises(EngineClosed):
        await rest(running)
    assert left_over([folder, *(Path(f"/proc/{pid}") for pid in pids)]) == []
    assert "ready" in events
    with pytest.raises(EngineClosed):
        await engine.status()


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.5])
async def test_closing_in_the_middle_of_a_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, after_s: float) -> None:
    with tempfile.TemporaryDirectory(prefix="drumclose", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        engine = AsyncEngine(EngineConfig(model="demo"))
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(after_s)
        await engine.close()
        with pytest.raises(StartFailed):
            await start
        assert names_in(folder) == []


async def test_a_killed_worker_that_cannot_be_replaced_ends_every_request_with_an_error_that_names_it() -> None:
    config = EngineConfig(model="demo", inline=True, faults=FaultConfig(restart_limit=0))
    async with AsyncEngine(config) as engine:
        status = await engine.status()
        running = [engine.generate(PROMPT, SamplingParams(**{**GREEDY, "max_tokens": None})) for _ in range(3)]
        for stream in running:
            await anext(stream)
        os.kill(status.ranks[0].pid, signal.SIGKILL)
        async with asyncio.timeout(20.0):
            for stream in running:
                with pytest.raises(RequestFailed, match="rank 0") as caught:
                    await rest(stream)
                assert caught.value.rank == 0
            with pytest.raises(EngineClosed):
                await engine.status()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model": "demo", "parallel": ParallelConfig(data_parallel_size=7)}, "enable_expert_parallel"),
        ({"model": "demo", "max_model_len": 10_000_000}, "max_model_len"),
    ],
)
async def test_a_config_that_cannot_work_fails_the_start_by_name(config: dict[str, Any], named: str) -> None:
    engine = AsyncEngine(EngineConfig(**config))
    with pytest.raises(InvalidConfig, match=named):
        await engine.start()
    await engine.close()
