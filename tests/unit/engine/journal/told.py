"""What a coordinator tells, made up, and what a journal must give back of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal import Batch, Journal
from drumline.engine.journal.batches import make_batch
from drumline.engine.journal.compaction import DEAD_BYTES
from drumline.engine.journal.writer import WHOLE_AFTER_S
from drumline.protocol.messages import LogprobEntry, SamplingSpec, StreamEnd, Submit


def i32(*numbers: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(numbers, dtype=np.int32)


def submit(request_id: str, n: int = 1, logprobs: int = -1, prompt: int = 3) -> Submit:
    return Submit(
        call_id=7,
        request_id=request_id,
        prompt=np.arange(prompt, dtype=np.int32),
        sampling=SamplingSpec(seed=len(request_id), logprobs=logprobs),
        max_tokens=1 << 20,
        n=n,
        seed_given=True,
        nonce=f"nonce of {request_id}",
        client_params=b"client's own",
    )


def entry(token: int) -> LogprobEntry:
    return LogprobEntry(token, -token / 8, 1, i32(token, token + 1), np.asarray([-0.5, -1.5], dtype=np.float32))


@dataclass
class Stream:
    request: Submit
    index: int
    handle: int
    tokens: list[int] = field(default_factory=list)
    end: StreamEnd | None = None


class Told:
    """Streams whose token at a position is a function of the request and the position, so that any part of them can be
    checked for being what was told."""

    def __init__(self) -> None:
        self.requests: dict[str, list[Stream]] = {}
        self._handles = 0

    def token(self, stream: Stream, position: int) -> int:
        return (sum(stream.request.request_id.encode()) * 31 + stream.index * 7 + position * position) % 50_000

    def take_over(self, restored: tuple[RestoredRequest, ...]) -> None:
        """Go on with what a journal gave back."""
        for one in restored:
            self.requests[one.submit.request_id] = [
                Stream(one.submit, index, one.first_handle + index, tokens.tolist(), one.ends[index])
                for index, tokens in enumerate(one.tokens)
            ]
            self._handles = max(self._handles, one.first_handle + one.submit.n - 1)

    def accept(self, *submits: Submit) -> Batch:
        notes = []
        for one in submits:
            first = self._handles + 1
            self._handles += one.n
            self.requests[one.request_id] = [Stream(one, index, first + index) for index in range(one.n)]
            notes.append((one, first))
        return make_batch(Notes(accepted=tuple(notes)), [])

    def rehandle(self, request_id: str) -> Batch:
        first = self._handles + 1
        for stream in self.requests[request_id]:
            stream.handle = first + stream.index
            if stream.end is not None:
                stream.end = msgspec.structs.replace(stream.end, handle=stream.handle)
        self._handles += len(self.requests[request_id])
        return make_batch(Notes(rehandled=((request_id, first),)), [])

    def forget(self, *request_ids: str) -> Batch:
        for request_id in request_ids:
            del self.requests[request_id]
        return make_batch(Notes(forgotten=request_ids), [])

    def step(self, count: int = 1, ending: str = "") -> Batch:
        """``count`` tokens of every stream that has not ended; those of request ``ending`` end."""
        output = ConnectionOutput(1)
        handles: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        index: list[int] = []
        entries: list[LogprobEntry] = []
        for streams in self.requests.values():
            for stream in streams:
                if stream.end is not None:
                    continue
                for _ in range(count):
                    token = self.token(stream, len(stream.tokens))
                    if stream.request.sampling.logprobs >= 0:
                        index.append(len(tokens))
                        entries.append(entry(token))
                    handles.append(stream.handle)
                    positions.append(len(stream.tokens))
                    tokens.append(token)
                    stream.tokens.append(token)
                if stream.request.request_id == ending:
                    stream.end = StreamEnd(stream.handle, ending, stream.index, "length", -1, len(stream.tokens))
                    output.ends.append(stream.end)
        output.handles, output.positions, output.tokens = i32(*handles), i32(*positions), i32(*tokens)
        output.logprob_index, output.logprobs = i32(*index), tuple(entries)
        return make_batch(None, [output])

    def snapshot(self) -> tuple[RestoredRequest, ...]:
        """All of it, as a core would tell it."""
        return tuple(
            RestoredRequest(
                streams[0].request,
                streams[0].handle,
                tuple(i32(*stream.tokens) for stream in streams),
                tuple(
                    tuple(entry(token) for token in stream.tokens) if stream.request.sampling.logprobs >= 0 else ()
                    for stream in streams
                ),
                tuple(stream.end for stream in streams),
            )
            for streams in sorted(self.requests.values(), key=lambda one: one[0].handle)
        )


def plain(requests: tuple[RestoredRequest, ...]) -> list[object]:
    """Comparable with ==."""
    return [
        (
            one.submit.request_id,
            one.submit.nonce,
            one.submit.prompt.tolist(),
            one.submit.sampling,
            one.submit.n,
            one.first_handle,
            [tokens.tolist() for tokens in one.tokens],
            [[(e.token, e.logprob, e.rank, e.top_tokens.tolist()) for e in entries] for entries in one.logprobs],
            [None if end is None else (end.handle, end.reason, end.num_tokens) for end in one.ends],
        )
        for one in sorted(requests, key=lambda one: one.submit.request_id)
    ]


def check_prefix(told: Told, found: tuple[RestoredRequest, ...]) -> int:
    """Every token is what was told at its position. Returns how many there are."""
    count = 0
    for one in found:
        assert one.submit.request_id == f"r{one.submit.request_id[1:]}"
        for index, tokens in enumerate(one.tokens):
            stream = Stream(one.submit, index, 0)
            assert tokens.tolist() == [told.token(stream, position) for position in range(len(tokens))]
            count += len(tokens)
    return count


def read(path: Path, ending: str = "") -> bytes:
    return path.with_name(path.name + ending).read_bytes()


def write(path: Path, data: bytes, ending: str = "") -> None:
    path.with_name(path.name + ending).write_bytes(data)


def there(path: Path, ending: str = "") -> bool:
    return path.with_name(path.name + ending).exists()


def remove(path: Path, ending: str = "") -> None:
    path.with_name(path.name + ending).unlink(missing_ok=True)


def beside(folder: Path, part: str) -> list[str]:
    """Names in a folder that have ``part`` in them."""
    return sorted(one.name for one in folder.iterdir() if part in one.name)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@dataclass
class Heard:
    """What a journal told."""

    states: list[tuple[str, str]] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    on_writable: Callable[[], None] | None = None

    def state(self, state: str, text: str) -> None:
        self.states.append((state, text))
        if state == "writable" and self.on_writable is not None:
            self.on_writable()

    @property
    def names(self) -> list[str]:
        return [state for state, _ in self.states]


@contextlib.asynccontextmanager
async def opened(
    path: Path | str,
    term: int,
    heard: Heard | None = None,
    *,
    dead_bytes: int = DEAD_BYTES,
    whole_after_s: float = WHOLE_AFTER_S,
) -> AsyncIterator[tuple[Journal, tuple[RestoredRequest, ...]]]:
    heard = heard or Heard()
    journal, restored = Journal.open(
        str(path),
        term,
        on_state=heard.state,
        on_superseded=heard.superseded.append,
        dead_bytes=dead_bytes,
        whole_after_s=whole_after_s,
    )
    try:
        yield journal, restored
    finally:
        journal.close()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Raises TimeoutError when the condition does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads
            await asyncio.sleep(0.005)


async def committed(journal: Journal, *batches: Batch) -> None:
    """Append and wait."""
    done: list[int] = []
    for number, batch in enumerate(batches):
        journal.append(batch, functools.partial(done.append, number))
    await until(lambda: len(done) == len(batches))
    assert done == list(range(len(batches)))
