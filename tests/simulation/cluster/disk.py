"""What a journal has committed, and the journal of one coordinator on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal import Batch
from drumline.engine.journal.writer import WHOLE_AFTER_S
from drumline.protocol.messages import LogprobEntry, StreamEnd, Submit
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster

RETRY_S = 1.0


@dataclass(slots=True)
class Kept:
    """One request as it stands on disk."""

    submit: Submit
    first_handle: int
    tokens: list[list[int]]
    logprobs: list[list[LogprobEntry]]
    ends: list[StreamEnd | None]

    @classmethod
    def of(cls, submit: Submit, first_handle: int) -> Kept:
        """A request that was just accepted."""
        return cls(
            submit, first_handle, [[] for _ in range(submit.n)], [[] for _ in range(submit.n)], [None] * submit.n
        )

    def restored(self) -> RestoredRequest:
        """As the next coordinator reads it."""
        return RestoredRequest(
            submit=self.submit,
            first_handle=self.first_handle,
            tokens=tuple(np.asarray(tokens, dtype=np.int32) for tokens in self.tokens),
            logprobs=tuple(tuple(entries) for entries in self.logprobs),
            ends=tuple(self.ends),
        )


@dataclass(slots=True)
class Disk:
    """Outlives coordinators. ``whole``: nothing is missing. ``full``: nothing can be committed."""

    term: int = 0
    whole: bool = True
    full: bool = False
    requests: dict[str, Kept] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)
    streams: dict[int, tuple[Kept, int]] = field(default_factory=dict)

    def restored(self) -> tuple[RestoredRequest, ...]:
        """All that is kept, by ascending handle."""
        kept = sorted(self.requests.values(), key=lambda one: one.first_handle)
        return tuple(one.restored() for one in kept)

    def commit(self, batch: Batch) -> None:
        """One batch, whole, in the order in which a batch is applied."""
        for request_id in batch.forgotten:
            gone = self.requests.pop(request_id, None)
            if gone is not None:
                self.streams = {handle: stream for handle, stream in self.streams.items() if stream[0] is not gone}
        for submit, first_handle in batch.accepted:
            self._keep(Kept.of(submit, first_handle))
        for request_id, first_handle in batch.rehandled:
            self._rehandle(request_id, first_handle)
        logprobs = dict(zip(batch.logprob_index.tolist(), batch.logprobs, strict=True))
        columns = (batch.handles.tolist(), batch.positions.tolist(), batch.tokens.tolist())
        for i, (handle, position, token) in enumerate(zip(*columns, strict=True)):
            self._token(handle, position, token, logprobs.get(i))
        for end in batch.ends:
            kept, index = self._stream(end.handle)
            kept.ends[index] = end
            del kept.tokens[index][end.num_tokens :]
            del kept.logprobs[index][end.num_tokens :]

    def _token(self, handle: int, position: int, token: int, entry: LogprobEntry | None) -> None:
        kept, index = self._stream(handle)
        tokens = kept.tokens[index]
        if position != len(tokens):
            text = f"token {position} of {kept.submit.request_id}/{index} is journalled after {len(tokens)} tokens"
            raise RuleBrokenError(text)
        tokens.append(token)
        if entry is not None:
            kept.logprobs[index].append(entry)

    def replace(self, snapshot: Sequence[RestoredRequest]) -> None:
        """All of it anew."""
        self.requests.clear()
        self.streams.clear()
        for one in snapshot:
            kept = Kept.of(one.submit, one.first_handle)
            kept.tokens = [tokens.tolist() for tokens in one.tokens]
            kept.logprobs = [list(entries) for entries in one.logprobs]
            kept.ends = list(one.ends)
            self._keep(kept)

    def _keep(self, kept: Kept) -> None:
        request_id = kept.submit.request_id
        if request_id in self.requests:
            raise RuleBrokenError(f"{request_id} is journalled as accepted and there already")
        self.requests[request_id] = kept
        self.ever.add(request_id)
        self._take_handles(kept)

    def _take_handles(self, kept: Kept) -> None:
        for index in range(kept.submit.n):
            handle = kept.first_handle + index
            if handle in self.streams:
                raise RuleBrokenError(f"handle {handle} of {kept.submit.request_id} is taken")
            self.streams[handle] = (kept, index)

    def _rehandle(self, request_id: str, first_handle: int) -> None:
        kept = self.requests.get(request_id)
        if kept is None:
            raise RuleBrokenError(f"{request_id} gets handles from {first_handle} on and is not journalled")
        kept.first_handle = first_handle
        self._take_handles(kept)

    def _stream(self, handle: int) -> tuple[Kept, int]:
        found = self.streams.get(handle)
        if found is None:
            raise RuleBrokenError(f"a token or an end of stream {handle} is journalled, which is nobody's")
        return found


class SimJournal:
    """The journal of one coordinator: commits in groups, some time after :meth:`append`. ``act`` does something in the
    coordinator's loop."""

    def __init__(
        self,
        cluster: Cluster,
        disk: Disk,
        on_state: Callable[[str, str], None],
        act: Callable[[Callable[[], None]], None],
    ) -> None:
        self._cluster = cluster
        self._act = act
        self._clock = cluster.clock
        self._disk = disk
        self._on_state = on_state
        self._queue: list[tuple[Batch, Callable[[], None]]] = []
        self._due = False
        self._gone = False
        self.state = "on"
        self.superseded = False
        self.whole = disk.whole
        if not disk.whole:
            self._clock.after(WHOLE_AFTER_S, self._heal)
        if disk.full:
            self.state = "degraded"
            disk.whole = False
            self._clock.after(RETRY_S, self._retry)

    def _heal(self) -> None:
        """Whoever still had something to bring has brought it by now."""
        if not self._gone:
            self.whole = True
            self._disk.whole = self.state == "on"

    def append(self, batch: Batch, on_committed: Callable[[], None]) -> None:
        """Commit ``batch`` after those before, then call ``on_committed``."""
        if self.state == "degraded":
            self._clock.after(0.0, partial(self._call, [on_committed]))
            return
        self._queue.append((batch, on_committed))
        if not self._due:
            self._due = True
            self._clock.soon(self._cluster.shape.commit_s, self._commit)

    def _commit(self) -> None:
        self._due = False
        if self._gone:
            return
        if self._disk.full:
            self._degrade()
            return
        self._write()

    def _write(self) -> None:
        queue, self._queue = self._queue, []
        for batch, _ in queue:
            self._disk.commit(batch)
        self._clock.seen["commits"] += 1
        # The coordinator hears of it a moment later; it may be dead by then.
        calls = [on_committed for _, on_committed in queue]
        self._clock.soon(0.0005, partial(self._call, calls))

    def _call(self, calls: Sequence[Callable[[], None]]) -> None:
        for call in calls:
            if not self._gone:
                self._act(call)

    def _degrade(self) -> None:
        self.state = "degraded"
        self._disk.whole = False
        self._clock.seen["journal_degraded"] += 1
        self._on_state("degraded", "the disk is full")
        queue, self._queue = self._queue, []
        self._call([on_committed for _, on_committed in queue])
        self._clock.after(RETRY_S, self._retry)

    def _retry(self) -> None:
        if self._gone:
            return
        if self._disk.full:
            self._clock.after(RETRY_S, self._retry)
        else:
            self._on_state("writable", "there is room again")

    def recover(self, snapshot: Sequence[RestoredRequest]) -> None:
        """Keep ``snapshot`` in place of all there was, and go on."""
        self._disk.replace(snapshot)
        self._disk.whole = self.whole
        self.state = "on"
        self._clock.seen["journal_recovered"] += 1
        self._on_state("on", "the journal is whole again")

    def flush(self) -> None:
        """Commit what waits now."""
        if not self._gone and self._queue and not self._disk.full:
            queue, self._queue = self._queue, []
            for batch, _ in queue:
                self._disk.commit(batch)
            self._call([on_committed for _, on_committed in queue])

    def crash(self) -> None:
        """Its process is gone. What is being committed is, or is not."""
        if self._queue and not self._disk.full and self._clock.random.random() < 0.3:
            self._write()
        self._gone = True
