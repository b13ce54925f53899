"""Streams that are kept running while faults happen, each compared with what it was without them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from drumline.engine.client import AsyncEngine
from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.equal import Sequence, compare
from drumline.protocol.errors import DrumlineError

KEPT_FAILURES = 50
PAUSE_AFTER_ERROR_S = 0.2


@dataclass(slots=True)
class Asked:
    """One request, which is made again and again. ``expected``: what its sequences are, by index."""

    prompt: str | list[int]
    params: SamplingParams
    expected: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """``lost``: requests that ended with an error, or without an end. ``duplicated``: those that gave a token twice or
    left one out. ``wrong``: those that ended with other tokens. ``ties``: sequences apart by a tie."""

    requests: int = 0
    tokens: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    ties: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, repeated or wrong."""
        return not (self.lost or self.duplicated or self.wrong)

    def fail(self, text: str) -> None:
        """Keep the first failures in words."""
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(text)


def make_requests(engine: AsyncEngine, streams: int, max_tokens: int, seed: int) -> list[Asked]:
    """Greedy and sampled ones in turn, with prompts of 4 tokens up to a quarter of the context, some with two
    sequences, some with penalties. The same for the same arguments and model."""
    rng = random.Random(seed)
    info = engine.model_info
    longest = max(4, min(info.max_prompt_tokens, info.max_model_len // 4, 256))
    asked: list[Asked] = []
    for number in range(streams):
        length = rng.randint(min(4, longest), longest)
        prompt = [rng.randrange(info.vocab_size) for _ in range(length)]
        tokens = min(rng.randint(max(1, max_tokens // 2), max_tokens), info.max_model_len - length)
        asked.append(Asked(prompt, _params(number, tokens, rng)))
    return asked


def _params(number: int, tokens: int, rng: random.Random) -> SamplingParams:
    sampled = bool(number % 2)
    return SamplingParams(
        temperature=0.8 if sampled else 0.0,
        seed=rng.randrange(1 << 31),
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        n=2 if number % 8 == 3 else 1,
        presence_penalty=0.4 if number % 8 in (5, 6) else 0.0,
        frequency_penalty=0.1 if number % 8 == 6 else 0.0,
    )


class Reading:
    """One request as it is read, each event checked against the one before."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.outputs: dict[int, RequestOutput] = {}
        self.broken = ""

    def take(self, output: RequestOutput) -> None:
        """An event."""
        before = self.outputs.get(output.index)
        known = before.token_ids if before is not None else []
        if output.token_ids != known + output.token_ids_delta:
            self.broken = f"index {output.index} repeats or leaves out tokens after position {len(known)}"
        if before is not None and before.finished:
            self.broken = f"index {output.index} goes on after its end"
        self.outputs[output.index] = output

    @property
    def sequences(self) -> list[Sequence]:
        """By index."""
        return [Sequence.of(output) for _, output in sorted(self.outputs.items())]

    @property
    def whole(self) -> bool:
        """Whether every sequence has had its end."""
        return len(self.outputs) == self.asked.params.n and all(one.finished for one in self.outputs.values())


class Load:
    """``on_token`` is called with a stream's number and the time whenever it moves on."""

    def __init__(self, engine: AsyncEngine, asked: list[Asked], on_token: Callable[[int, float], None]) -> None:
        self.engine = engine
        self.asked = asked
        self.tally = Tally()
        self._on_token = on_token
        self._over = asyncio.Event()

    async def learn(self) -> None:
        """Run every request once, undisturbed: what comes out is expected from then on."""
        for asked, reading in zip(self.asked, await asyncio.gather(*map(self._undisturbed, self.asked)), strict=True):
            asked.expected = reading.sequences

    async def _undisturbed(self, asked: Asked) -> Reading:
        reading = Reading(asked)
        async for output in self.engine.generate(asked.prompt, asked.params):
            reading.take(output)
        if not reading.whole or reading.broken:
            raise DrumlineError(f"a request without any fault is not whole: {reading.broken or 'it has no end'}")
        return reading

    async def run(self) -> None:
        """Keep every stream running until :meth:`finish`, then to the end of what runs."""
        async with asyncio.TaskGroup() as tasks:
            for number, asked in enumerate(self.asked):
                tasks.create_task(self._again_and_again(number, asked))

    def finish(self) -> None:
        """Begin no more requests."""
        self._over.set()

    async def _again_and_again(self, number: int, asked: Asked) -> None:
        turn = 0
        while not self._over.is_set():
            if not await self._once(number, asked, f"chaos-{number}-{turn}"):
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)  # an engine that has ended fails at once
            turn += 1

    async def _once(self, number: int, asked: Asked, request_id: str) -> bool:
        reading = Reading(asked)
        self.tally.requests += 1
        try:
            async for output in self.engine.generate(asked.prompt, asked.params, request_id=request_id):
                reading.take(output)
                if output.token_ids_delta:
                    self.tally.tokens += len(output.token_ids_delta)
                    self._on_token(number, time.monotonic())
        except DrumlineError as error:
            self.tally.lost += 1
            self.tally.fail(f"{request_id}: {error.kind}: {error.text}")
            return False
        self._judge(request_id, reading)
        return True

    def _judge(self, request_id: str, reading: Reading) -> None:
        tally, asked = self.tally, reading.asked
        if reading.broken:
            tally.duplicated += 1
            tally.fail(f"{request_id}: {reading.broken}")
        elif not reading.whole:
            tally.lost += 1
            tally.fail(f"{request_id}: it stopped without an end")
        else:
            pairs = zip(asked.expected, reading.sequences, strict=True)
            found = [compare(expected, got, asked.params, index) for index, (expected, got) in enumerate(pairs)]
            tally.ties += sum(one.tie for one in found)
            if not all(one.equal for one in found):
                tally.wrong += 1
                tally.fail(f"{request_id}: {'; '.join(map(str, found))}")
