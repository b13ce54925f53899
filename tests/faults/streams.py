"""Streams that are kept running while faults happen, each request compared with what it says undisturbed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from drumline.engine.client import AsyncEngine
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.load import Asked, Load
from tests.faults.gaps import Gaps

STREAMS = 32
TOKENS = 40
WITHIN_S = 60.0
SMALLEST_ID, IDS = 3, 240
"""Token ids that every model of the tests has."""
TIES_PER_SEQUENCE = 1 / 500


def requests(streams: int = STREAMS, tokens: int = TOKENS) -> list[Asked]:
    """Greedy and sampled ones in turn, some with two sequences, some with a penalty; what decides ties is reported."""
    return [Asked(prompt_of(number), params_of(number, tokens)) for number in range(streams)]


def prompt_of(number: int) -> list[int]:
    """Of its own tokens and more or fewer of them; one block that may be cached, and a rest."""
    return [SMALLEST_ID + (number * 17 + place * 5) % IDS for place in range(17 + number % 11)]


def params_of(number: int, tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.8 * (number % 2),
        seed=number,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        n=2 if number % 16 == 3 else 1,
        presence_penalty=0.4 if number % 16 in (5, 6) else 0.0,
    )


@dataclass
class Streams:
    """The streams of one engine. ``moved``: how often each of them has moved on."""

    engine: AsyncEngine
    asked: list[Asked]
    gaps: Gaps
    moved: list[int]
    requests: int = 0
    sequences: int = 0
    ties: int = 0
    failed: list[str] = field(default_factory=list)

    @classmethod
    async def learned(cls, engine: AsyncEngine, asked: list[Asked] | None = None) -> Streams:
        """Those of ``asked``, whose answers have been learned from ``engine`` before any fault."""
        asked = requests() if asked is None else asked
        await Load(engine, asked, lambda number, at: None).learn()
        return cls(engine, asked, Gaps(len(asked)), [0] * len(asked))

    def _moved(self, number: int, at: float) -> None:
        self.moved[number] += 1
        self.gaps.token(number, at)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep them running; in the end every request that was made has said what was expected, and ended."""
        load = Load(self.engine, self.asked, self._moved)
        running = asyncio.create_task(load.run())
        try:
            yield
            load.finish()
            async with asyncio.timeout(WITHIN_S):
                await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        tally = load.tally
        assert tally.clean, tally.failures
        assert tally.requests >= len(self.asked)
        self.requests += tally.requests
        self.sequences += tally.requests * sum(one.params.n for one in self.asked) // len(self.asked)
        self.ties += tally.ties
        assert self.ties <= 1 + self.sequences * TIES_PER_SEQUENCE, f"{self.ties} ties of {self.sequences}"

    def fault(self, kind: str, known: bool = True) -> None:
        """One happens now; unless ``known``, the engine is to tell of it (``gaps.told()``)."""
        self.gaps.fault(kind, time.monotonic(), known)

    async def move_on(self, pieces: int = 2) -> None:
        """Wait until every stream has moved on so many times more."""
        goal = [count + pieces for count in self.moved]
        deadline = time.monotonic() + WITHIN_S
        while any(count < least for count, least in zip(self.moved, goal, strict=True)):
            still = [number for number, count in enumerate(self.moved) if count < goal[number]]
            assert time.monotonic() < deadline, f"streams {still} stand still"
            await asyncio.sleep(0.005)

    def report(self, title: str) -> str:
        """Times to the next token by kind of fault, and how many requests were compared."""
        lines = [f"{title}: {self.requests} requests equal, {self.ties} ties"]
        for kind, one in self.gaps.spreads().items():
            times = f"p50 {1e3 * one.p50_s:.0f} ms, p99 {1e3 * one.p99_s:.0f} ms, longest {1e3 * one.max_s:.0f} ms"
            lines.append(f"{title} {kind}: {one.count} times to the next token, {times}")
        return "\n".join(lines)
