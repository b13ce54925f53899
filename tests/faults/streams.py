"""Streams that run while faults happen: what they said, when, and whether it is what they say undisturbed."""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from drumline.engine.client import AsyncEngine
from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing import Comparison, compare
from drumline.engine.testing import Sequence as Read

STREAMS = 32
WITHIN_S = 60.0
SMALLEST_ID, IDS = 3, 240
"""Token ids that every model of the tests has and none ends at."""


def prompt_of(number: int) -> list[int]:
    """Of another length and other tokens for each number; cached blocks leave something to prefill."""
    return [SMALLEST_ID + (number * 17 + place * 5) % IDS for place in range(17 + number % 11)]


def params_of(number: int, tokens: int) -> SamplingParams:
    """Every second stream is sampled; what decides ties is reported."""
    return SamplingParams(
        temperature=0.8 * (number % 2), seed=number, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False
    )


@dataclass
class Stream:
    """One stream. ``times``: of ``time.monotonic()``, when each piece of it was read."""

    number: int
    params: SamplingParams
    times: list[float] = field(default_factory=list)
    length: int = 0
    task: asyncio.Task[Read] | None = None

    async def read(self, engine: AsyncEngine, request_id: str | None) -> Read:
        last: RequestOutput | None = None
        async for output in engine.generate(prompt_of(self.number), self.params, request_id):
            last = output
            self.length = len(output.token_ids)
            self.times.append(time.monotonic())
        assert last is not None, f"stream {self.number} ended without a word"
        return Read.of(last)

    def gap_after(self, moment: float) -> float | None:
        """From ``moment`` to the next piece, None when it had ended by then."""
        place = bisect.bisect_right(self.times, moment)
        return self.times[place] - moment if place < len(self.times) else None


@dataclass
class Streams:
    """``count`` streams of ``tokens`` tokens each on one engine; ``expected`` is what they say undisturbed.

    ``ties``: streams that differed by a tie alone, of the ``compared`` ones.
    """

    engine: AsyncEngine
    tokens: int
    count: int = STREAMS
    expected: list[Read] = field(default_factory=list)
    running: list[Stream] = field(default_factory=list)
    compared: int = 0
    ties: int = 0

    async def undisturbed(self) -> None:
        """Have ``expected`` said; what is said twice is the same."""
        self.start()
        self.expected = [await task for task in self._tasks()]
        assert all(len(one.tokens) == self.tokens for one in self.expected)

    def start(self, name: Callable[[int], str | None] = lambda number: None) -> None:
        """Begin all streams anew; ``name`` gives the request's id."""
        assert not any(not task.done() for task in self._tasks())
        self.running = [Stream(number, params_of(number, self.tokens)) for number in range(self.count)]
        for one in self.running:
            one.task = asyncio.create_task(one.read(self.engine, name(one.number)))

    def _tasks(self) -> list[asyncio.Task[Read]]:
        return [one.task for one in self.running if one.task is not None]

    async def decoding(self, least: int = 4) -> None:
        """Wait until every stream has ``least`` tokens; none has ended by then."""
        deadline = time.monotonic() + WITHIN_S
        while any(one.length < least for one in self.running):
            await self._look(deadline, f"not all streams came to {least} tokens")
        assert not any(task.done() for task in self._tasks()), "a stream ended before the fault: too few tokens"

    async def go_on(self, moment: float) -> None:
        """Wait until every stream that had not ended has said something after ``moment``."""
        deadline = time.monotonic() + WITHIN_S
        while any(one.gap_after(moment) is None and not _over(one) for one in self.running):
            await self._look(deadline, "not all streams go on")

    async def _look(self, deadline: float, what: str) -> None:
        for task in self._tasks():
            if task.done() and task.exception() is not None:
                await task  # raises
        lengths = [one.length for one in self.running]
        assert time.monotonic() < deadline, f"{what} within {WITHIN_S:g} s: {lengths}"
        await asyncio.sleep(0.005)

    async def equal(self, but: Sequence[int] = ()) -> None:
        """Wait for the end of all streams except ``but``; each has said what it says undisturbed."""
        async with asyncio.timeout(WITHIN_S):
            for one, expected in zip(self.running, self.expected, strict=True):
                if one.number not in but:
                    assert one.task is not None
                    self._compare(one, expected, await one.task)

    def _compare(self, one: Stream, expected: Read, found: Read) -> None:
        seen: Comparison = compare(expected, found, one.params)
        assert seen.equal, f"stream {one.number}: {seen}\nexpected {expected.tokens}\nfound    {found.tokens}"
        self.compared += 1
        self.ties += seen.tie

    def gaps(self, moment: float) -> list[float]:
        """From ``moment`` to the next token of every stream that had not ended by then, in seconds."""
        return [gap for one in self.running if (gap := one.gap_after(moment)) is not None]


def _over(one: Stream) -> bool:
    return one.task is None or one.task.done()


class Gaps(msgspec.Struct):
    """Times from a fault to the next token, over streams and faults. ``kills``: how many faults."""

    seconds: list[float] = []
    kills: int = 0

    def add(self, gaps: Sequence[float]) -> None:
        """One more fault."""
        self.seconds = sorted([*self.seconds, *gaps])
        self.kills += 1

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.kills} kills, no stream ran"
        at = [self.seconds[min(int(len(self.seconds) * share), len(self.seconds) - 1)] for share in (0.5, 0.99)]
        return (
            f"{self.kills} kills, {len(self.seconds)} times to the next token: p50 {1e3 * at[0]:.0f} ms, "
            f"p99 {1e3 * at[1]:.0f} ms, longest {1e3 * self.seconds[-1]:.0f} ms"
        )
