"""How a request that is read under faults is judged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.outputs import Logprob, RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.equal import Sequence
from drumline.engine.testing.load import Asked, Load, Tally
from drumline.protocol.errors import RequestFailed

EXPECTED = (5, 6, 7)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


def output(tokens: tuple[int, ...], new: int, end: str | None = None, logprob: float = -1.0) -> RequestOutput:
    entries = [{token: Logprob(logprob, 1, "")} for token in tokens]
    return RequestOutput(
        request_id="r",
        index=0,
        prompt=None,
        prompt_token_ids=[1],
        token_ids=list(tokens),
        token_ids_delta=list(tokens[len(tokens) - new :]),
        text="",
        text_delta="",
        logprobs=entries,
        finish_reason=end,
        finished=end is not None,
    )


class Scripted:
    """An engine that gives what it is told to give, then no more of it."""

    def __init__(self, *script: RequestOutput | Exception) -> None:
        self._script = script
        self.load: Load | None = None

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[RequestOutput]:
        for one in self._script:
            if isinstance(one, Exception):
                raise one
            yield one
        assert self.load is not None
        self.load.finish()


async def judged(*script: RequestOutput | Exception) -> tuple[Tally, int]:
    engine = Scripted(*script)
    moved: list[int] = []
    asked = Asked([1], GREEDY, [Sequence(EXPECTED, (-1.0,) * 3, "length")])
    load = engine.load = Load(cast(AsyncEngine, engine), [asked], lambda stream, _: moved.append(stream))
    if any(isinstance(one, Exception) for one in script):
        load.finish()  # the first request is not begun any more: make it by hand
        await load._once(0, asked, "r")
    else:
        async with asyncio.timeout(5.0):
            await load.run()
    return load.tally, len(moved)


async def test_what_comes_as_expected_is_clean() -> None:
    tally, moved = await judged(output((5,), 1), output(EXPECTED, 2, "length"))
    assert tally.clean
    assert (tally.requests, tally.tokens, tally.ties, moved) == (1, 3, 0, 2)


async def test_a_tie_is_counted_and_clean() -> None:
    tally, _ = await judged(output((5, 6, 8), 3, "length", -1.00001))
    assert tally.clean
    assert tally.ties == 1


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ([output((5,), 1), RequestFailed("a rank is gone")], "lost"),
        ([output((5,), 1)], "lost"),
        ([output((5,), 1), output((5, 5, 6), 1, "length")], "duplicated"),
        ([output((5, 6), 2), output((5, 6, 7), 2, "length")], "duplicated"),
        ([output(EXPECTED, 3, "length"), output(EXPECTED, 0, "length")], "duplicated"),
        ([output((5, 6, 8), 3, "length", -2.0)], "wrong"),
        ([output((5, 6), 2, "length")], "wrong"),
        ([output(EXPECTED, 3, "stop")], "wrong"),
    ],
    ids=["an error", "no end", "a token left out", "a token twice", "two ends", "another token", "too short", "ends"],
)
async def test_anything_else_is_told(script: list[RequestOutput | Exception], field: str) -> None:
    tally, _ = await judged(*script)
    assert not tally.clean
    assert getattr(tally, field) == 1
    assert tally.lost + tally.duplicated + tally.wrong == 1
    assert len(tally.failures) == 1
