"""A request and its sequences: what the core remembers beside the batch table."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec
import numpy as np

from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import I32, LogprobEntry, SamplingSpec, StreamEnd, Submit


class Place(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """In the queue of its replica, or about to be: a preempted sequence whose last tokens are still in flight."""
    RUNNING = "running"
    """In a row, until its last token is known."""
    HELD = "held"
    """In no queue: it may not run anywhere now, or moves to another replica once its row is free."""
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of the ``n`` continuations of a request; while it runs it is a row of the batch table.

    ``tokens``: int32 (length,), prompt and generated tokens as they were when the sequence last entered or left a row;
    what it generates in the row stands in the table's history. ``late`` holds tokens that arrived after it had left.
    ``row`` is -1 without one; a row is held until no step in flight computes it. ``computed`` counts planned KV entries
    and is kept up only while the row is in prefill. ``lane`` is that of the row.
    """

    request: Request
    index: int
    stream: int
    arrival: int
    replica: int
    tokens: I32
    max_length: int
    place: Place = Place.WAITING
    row: int = -1
    lane: int = 0
    computed: int = 0
    num_cached: int = -1
    late: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    end: StreamEnd | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sorts the most deserving first: lowest priority number, then earliest arrival."""
        return (self.request.priority, self.arrival)

    def fold_late_tokens(self) -> None:
        """Moves what is in ``late`` to the end of ``tokens``."""
        if self.late:
            self.tokens = np.concatenate([self.tokens, np.asarray(self.late, dtype=np.int32)])
            self.late.clear()


@dataclass(slots=True, eq=False)
class Request:
    """What a client submitted, and who is to be told about it.

    ``submit`` has the seed that was drawn. ``connection`` is 0 while nobody reads it; it is given up at ``expires_at``
    then. ``prefix``: uint64 (full blocks of the prompt, 4), hash states of its prefixes, shared by all sequences.
    ``cancels`` holds the calls (connection, call id) to confirm once every row is free. ``sampling`` has its seed drawn
    and EOS among its stop ids. ``failed``: why it failed, if it did.
    """

    submit: Submit
    connection: int
    sampling: SamplingSpec
    prompt: I32
    group: int
    sequences: list[Sequence] = field(default_factory=list)
    prefix: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] | None = None
    unended: int = 0
    rows_held: int = 0
    aborted: bool = False
    failed: ErrorInfo | None = None
    expires_at: float = 0.0
    cancels: list[tuple[int, int]] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The id that its client gave it."""
        return self.submit.request_id

    @property
    def priority(self) -> int:
        """A lower number goes first."""
        return self.submit.priority

    @property
    def live(self) -> list[Sequence]:
        """The sequences that have not ended."""
        return [sequence for sequence in self.sequences if sequence.place is not Place.ENDED]

    @property
    def handles(self) -> I32:
        """int32 (n,): the stream handle of each sequence."""
        return np.asarray([sequence.stream for sequence in self.sequences], dtype=np.int32)

    def spec(self, index: int) -> SamplingSpec:
        """The sampling parameters of one sequence as a worker needs them."""
        return msgspec.structs.replace(self.sampling, index=index)

    def ending(self, sequence: Sequence, tokens: I32) -> tuple[int, str, int] | None:
        """Where generated ``tokens`` of a sequence end it: (number of tokens up to the end, reason, stop token or -1);
        None where they do not."""
        stops = np.isin(tokens, self.sampling.stop_token_ids)
        stops[: self.sampling.min_tokens] = False
        room = sequence.max_length - len(self.prompt)
        hits = np.flatnonzero(stops)
        if len(hits) and hits[0] < room:
            return int(hits[0]) + 1, "stop", int(tokens[hits[0]])
        if len(tokens) >= room:
            return max(room, 0), "length", -1
        return None
