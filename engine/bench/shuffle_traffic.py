"""Streams that are kept running, and the times between their tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from drumline.engine.bench.shuffle_prompts import KINDS
from drumline.engine.client import AsyncEngine
from drumline.engine.sampling_params import SamplingParams

TEMPERATURE = 0.7


class Traffic:
    """``streams`` requests of ``max_tokens`` tokens at once, one after the other, of one ``kind`` (prose or code).
    ``gaps``: of every token but the first of a request, when it came, in the seconds of ``time.monotonic()``, and how
    long after the one before."""

    def __init__(self, engine: AsyncEngine, streams: int, max_tokens: int, seed: int) -> None:
        self.kind = "prose"
        self.gaps: list[tuple[float, float]] = []
        self.tokens = 0
        self._engine = engine
        self._streams = streams
        self._max_tokens = max_tokens
        self._seed = seed

    async def run(self) -> None:
        """Until it is cancelled. What a request ends with, if not with all its tokens, is raised."""
        async with asyncio.TaskGroup() as tasks:
            for stream in range(self._streams):
                tasks.create_task(self._again_and_again(stream))

    async def _again_and_again(self, stream: int) -> None:
        turn = 0
        while True:
            prompts: Sequence[str] = KINDS[self.kind]
            await self._once(prompts[(stream + turn) % len(prompts)], self._seed + stream + turn * self._streams)
            turn += 1

    async def _once(self, prompt: str, seed: int) -> None:
        # Requests do not begin and end together.
        tokens = self._max_tokens // 2 + seed * 7919 % (self._max_tokens // 2 + 1)
        params = SamplingParams(
            temperature=TEMPERATURE, seed=seed, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        before = 0.0
        async for output in self._engine.generate(prompt, params):
            if not output.token_ids_delta:
                continue
            now = time.monotonic()
            self.tokens += len(output.token_ids_delta)
            if before:
                self.gaps.append((now, now - before))
            before = now
