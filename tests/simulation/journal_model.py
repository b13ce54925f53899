"""A journal without a disk: what notes and outputs have told, and the requests that another core is given of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.core.restored import RestoredRequest
from drumline.protocol.messages import LogprobEntry, StreamEnd, Submit
from tests.simulation.worker import RuleBrokenError


@dataclass(slots=True)
class Kept:
    """One request."""

    submit: Submit
    first_handle: int
    tokens: list[list[int]]
    logprobs: list[list[LogprobEntry]]
    ends: list[StreamEnd | None]


class JournalModel:
    """Requests by id, streams by handle. A token that does not follow on what is there breaks a rule."""

    def __init__(self, restored: Iterable[RestoredRequest] = ()) -> None:
        self._requests: dict[str, Kept] = {}
        self._streams: dict[int, tuple[Kept, int]] = {}
        for one in restored:
            tokens, logprobs = [own.tolist() for own in one.tokens], [list(own) for own in one.logprobs]
            kept = Kept(one.submit, one.first_handle, tokens, logprobs, list(one.ends))
            self._requests[one.submit.request_id] = kept
            self._point(kept)

    def write(self, notes: Notes | None, outputs: list[ConnectionOutput]) -> None:
        """One batch: notes first."""
        if notes is not None:
            for request_id in notes.forgotten:
                self._requests.pop(request_id, None)
            for submit, first in notes.accepted:
                n = submit.n
                kept = Kept(submit, first, [[] for _ in range(n)], [[] for _ in range(n)], [None] * n)
                self._requests[submit.request_id] = kept
                self._point(kept)
            for request_id, first in notes.rehandled:
                self._requests[request_id].first_handle = first
                self._point(self._requests[request_id])
        for output in outputs:
            self._write_output(output)

    def _point(self, kept: Kept) -> None:
        self._streams.update({kept.first_handle + index: (kept, index) for index in range(kept.submit.n)})

    def _write_output(self, output: ConnectionOutput) -> None:
        entries = dict(zip(output.logprob_index.tolist(), output.logprobs, strict=True))
        spans = (output.handles.tolist(), output.positions.tolist(), output.tokens.tolist())
        for i, (handle, position, token) in enumerate(zip(*spans, strict=True)):
            kept, index = self._streams[handle]
            if len(kept.tokens[index]) != position:
                at = f"{kept.submit.request_id}/{index}"
                raise RuleBrokenError(f"journal: {at} gets position {position} after {len(kept.tokens[index])} tokens")
            kept.tokens[index].append(token)
            if i in entries:
                kept.logprobs[index].append(entries[i])
        for end in output.ends:
            kept, index = self._streams[end.handle]
            kept.ends[index] = end
            del kept.tokens[index][end.num_tokens :], kept.logprobs[index][end.num_tokens :]

    def requests(self) -> tuple[RestoredRequest, ...]:
        """What is kept, in the order of arrival."""
        return tuple(
            RestoredRequest(
                kept.submit,
                kept.first_handle,
                tuple(np.asarray(own, dtype=np.int32) for own in kept.tokens),
                tuple(tuple(own) for own in kept.logprobs),
                tuple(kept.ends),
            )
            for kept in self._requests.values()
        )

    def check(self, snapshot: tuple[RestoredRequest, ...]) -> None:
        """A snapshot of the core says the same."""
        told, kept = [_shown(one) for one in snapshot], [_shown(one) for one in self.requests()]
        if told != kept:
            raise RuleBrokenError(f"the core's snapshot is {told}, its journal {kept}")


def _shown(one: RestoredRequest) -> tuple[object, ...]:
    tokens = [own.tolist() for own in one.tokens]
    ends = [None if end is None else (end.reason, end.num_tokens) for end in one.ends]
    logprobs = [len(own) for own in one.logprobs]
    return one.submit.request_id, one.first_handle, one.submit.sampling.seed, tokens, logprobs, ends
