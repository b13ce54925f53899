"""Steps in flight, and what their results mean for the rows that they computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.batch_table import DETACHED, DRAIN, FREE, LEFT, BatchTable
from drumline.engine.core.block_pool import I32, I64
from drumline.engine.core.request import Sequence
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import LogprobEntry, StepDone


@dataclass(slots=True)
class InFlight:
    """A step that has been sent. ``rows`` sample in it, ascending; replica ``r`` has those from ``bounds[r]`` on.

    ``fills[r]``: (row, KV entries after the step) of rows in prefill. ``tokens`` is filled as replicas answer;
    ``arrived`` are the replicas whose answers have not been booked yet, ``missing`` counts those that have not
    answered, of ``replicas`` that serve.
    """

    step: int
    rows: I64
    bounds: list[int]
    fills: dict[int, list[tuple[int, int]]]
    admitted: list[int]
    tokens: I32
    replicas: int
    missing: int
    arrived: list[int] = field(default_factory=list)
    logprobs: dict[int, tuple[I32, tuple[LogprobEntry, ...]]] = field(default_factory=dict)

    def store(self, replica: int, done: StepDone, vocab_size: int) -> None:
        """Keeps a replica's answer. Raises :class:`ProtocolError` when it does not fit the step."""
        start, end = self.bounds[replica], self.bounds[replica + 1]
        tokens = done.tokens
        if tokens.shape != (end - start,):
            raise _refused(done, f"{end - start} rows sampled, tokens of shape {tokens.shape} came back")
        # Seen as unsigned, a negative token is a very large one: one comparison for both ends.
        if end > start and tokens.view(np.uint32).max() >= vocab_size:
            raise _refused(done, f"token {tokens.min()} to {tokens.max()} of a vocabulary of {vocab_size}")
        index = done.logprob_index
        if len(index) or done.logprobs:
            if index.shape != (len(done.logprobs),) or np.any(np.diff(index) <= 0):
                raise _refused(done, f"{len(done.logprobs)} logprob entries for places {index.tolist()}")
            if index[0] < 0 or index[-1] >= end - start:
                raise _refused(done, f"logprobs at places {index.tolist()} of {end - start} tokens")
            self.logprobs[replica] = (index, done.logprobs)
        self.tokens[start:end] = tokens
        self.arrived.append(replica)
        self.missing -= 1


def check_acknowledgement(done: StepDone) -> None:
    """A rank that does not report for its replica says that it has run the step, and no more. Raises
    :class:`ProtocolError` when it brings tokens."""
    if len(done.tokens) or len(done.logprob_index) or done.logprobs:
        raise _refused(done, f"{len(done.tokens)} tokens came from a rank that acknowledges only")


def _refused(done: StepDone, text: str) -> ProtocolError:
    message = f"rank {done.rank}, step {done.step}: {text}"
    return ProtocolError(
        message, ErrorInfo(kind=ProtocolError.kind, text=message, rank=done.rank, epoch=done.epoch, step=done.step)
    )


@dataclass(slots=True)
class Emission:
    """Tokens of one step on their way to clients; arrays of one entry per token. ``logprobs`` maps entries to
    theirs."""

    connections: I64
    streams: I32
    positions: I32
    tokens: I32
    logprobs: dict[int, LogprobEntry]


@dataclass(slots=True)
class Ending:
    """A sequence that ended by itself: at a stop token (else -1) or by its length."""

    sequence: Sequence
    reason: str
    stop_token: int


def settle(record: InFlight, table: BatchTable) -> tuple[Emission | None, list[Ending]]:
    """Books the answers that have arrived for one step, read against the table as it stood at that step.

    A row is not reused while a step in flight computes it, so its sequence is still the one that the step computed; if
    it has ended since, its token is discarded.
    """
    for replica in record.arrived:
        for row, filled in record.fills.get(replica, ()):
            if FREE < table.status[row] <= DRAIN:
                table.filled[row] = filled
    rows, tokens, logprobs = _arrived(record)
    record.arrived.clear()
    if len(rows) == 0:
        return None, []
    status = table.status[rows]
    special = status.max() > DRAIN
    if special:
        counted = status != LEFT
        logprobs = _renumber(logprobs, counted)
        rows, tokens, status = rows[counted], tokens[counted], status[counted]
        if len(rows) == 0:
            return None, []
    positions = table.commit(rows, tokens)
    if special:
        for i in np.flatnonzero(status == DETACHED).tolist():
            _sequence(table, int(rows[i])).late.append(int(tokens[i]))
    for i, entry in logprobs.items():
        _sequence(table, int(rows[i])).logprobs.append(entry)
    outputs = positions - table.prompt_len[rows]
    emission = Emission(table.connection[rows], table.stream[rows], outputs, tokens, logprobs)
    stopped = table.stopping(rows, tokens)
    stopped &= outputs >= table.min_tokens[rows]
    ended = stopped | (positions >= table.max_length[rows] - 1)
    endings: list[Ending] = []
    for i in ended.nonzero()[0].tolist():
        reason, stop_token = ("stop", int(tokens[i])) if stopped[i] else ("length", -1)
        endings.append(Ending(_sequence(table, int(rows[i])), reason, stop_token))
    return emission, endings


def _arrived(record: InFlight) -> tuple[I64, I32, dict[int, LogprobEntry]]:
    """Rows and tokens of the replicas that have arrived, and logprobs by entry."""
    bounds = record.bounds
    if len(record.arrived) == record.replicas:
        starts = bounds[:-1]
        rows, tokens = record.rows, record.tokens
    else:
        spans = [slice(bounds[replica], bounds[replica + 1]) for replica in record.arrived]
        rows = np.concatenate([record.rows[span] for span in spans])
        tokens = np.concatenate([record.tokens[span] for span in spans])
        starts = [0] * (len(bounds) - 1)
        before = 0
        for replica, span in zip(record.arrived, spans, strict=True):
            starts[replica] = before
            before += span.stop - span.start
    logprobs: dict[int, LogprobEntry] = {}
    for replica in record.arrived:
        if replica in record.logprobs:
            index, entries = record.logprobs[replica]
            logprobs.update(zip((index + starts[replica]).tolist(), entries, strict=True))
    return rows, tokens, logprobs


def _renumber(
    logprobs: dict[int, LogprobEntry], counted: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> dict[int, LogprobEntry]:
    place = np.cumsum(counted) - 1
    return {int(place[i]): entry for i, entry in logprobs.items() if counted[i]}


def _sequence(table: BatchTable, row: int) -> Sequence:
    sequence = table.sequences[row]
    if sequence is None:
        raise LookupError(f"row {row} was computed without a sequence")
    return sequence
