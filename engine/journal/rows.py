"""The rows of the journal's tables: what stands in their blobs, and their checksums.

SQLite's own checksums cover its log only. Every row has one of its own, and the sum over all rows stands in the table
``meta``, so that no mixture of older and newer pages passes for what was written.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.errors import Damaged
from drumline.protocol.codec import Codec, DecodeError, Frame
from drumline.protocol.messages import I32, NO_NUMBERS, LogprobEntry, StreamEnd, Submit

# One frame: arrays of any length stand inside it.
_submits: Codec[Submit] = Codec(Submit, max_frames=1)
_entries: Codec[tuple[LogprobEntry, ...]] = Codec(tuple[LogprobEntry, ...], max_frames=1)
_ends: Codec[tuple[StreamEnd, ...]] = Codec(tuple[StreamEnd, ...], max_frames=1)
_HEAD = struct.Struct("<q6q")
_NUMBERS = struct.Struct("<2q")

TOKENS_PER_ROW = 1 << 16
TOTAL_MASK = (1 << 62) - 1
"""What the sum of all checksums is cut to: SQLite's integers have 64 bits and a sign."""


class Columns(NamedTuple):
    """Tokens of a row: int32 arrays as in a Batch, and its logprobs and ends."""

    handles: I32 = NO_NUMBERS
    positions: I32 = NO_NUMBERS
    tokens: I32 = NO_NUMBERS
    logprob_index: I32 = NO_NUMBERS
    logprobs: tuple[LogprobEntry, ...] = ()
    ends: tuple[StreamEnd, ...] = ()


class StepRow(NamedTuple):
    """A row of the table ``steps``. Arrays are int32, little-endian as everywhere that this runs."""

    seq: int
    handles: bytes
    positions: bytes
    tokens: bytes
    logprob_index: bytes
    logprobs: bytes
    ends: bytes
    checksum: int

    @property
    def nbytes(self) -> int:
        """Of its blobs."""
        return sum(len(blob) for blob in self[1:7])


class RequestRow(NamedTuple):
    """A row of the table ``requests``."""

    first: int
    submit: bytes
    checksum: int


class RehandledRow(NamedTuple):
    """A row of the table ``rehandled``: the request that came with handle ``request`` has those from ``first`` on."""

    first: int
    request: int
    checksum: int


def step_row(seq: int, columns: Columns) -> StepRow:
    """``columns`` as a row."""
    blobs = (
        columns.handles.tobytes(),
        columns.positions.tobytes(),
        columns.tokens.tobytes(),
        columns.logprob_index.tobytes(),
        _blob(_entries.encode(columns.logprobs)) if columns.logprobs else b"",
        _blob(_ends.encode(columns.ends)) if columns.ends else b"",
    )
    return StepRow(seq, *blobs, _step_checksum(seq, blobs))


def request_row(submit: Submit, first: int) -> RequestRow:
    """A request as a row."""
    blob = _blob(_submits.encode(submit))
    return RequestRow(first, blob, zlib.crc32(blob, first & 0xFFFFFFFF))


def rehandled_row(first: int, request: int) -> RehandledRow:
    """New handles as a row."""
    return RehandledRow(first, request, zlib.crc32(_NUMBERS.pack(first, request)))


def read_step(row: StepRow) -> Columns:
    """The columns of a row. Raises Damaged unless they are what was written."""
    if _step_checksum(row.seq, row[1:7]) != row.checksum:
        raise Damaged(f"step row {row.seq} does not have its checksum")
    try:
        return Columns(
            np.frombuffer(row.handles, np.int32),
            np.frombuffer(row.positions, np.int32),
            np.frombuffer(row.tokens, np.int32),
            np.frombuffer(row.logprob_index, np.int32),
            _entries.decode([row.logprobs]) if row.logprobs else (),
            _ends.decode([row.ends]) if row.ends else (),
        )
    except (DecodeError, ValueError) as error:
        raise Damaged(f"step row {row.seq}: {error}") from error


def read_request(row: RequestRow) -> Submit:
    """The request of a row. Raises Damaged unless it is what was written."""
    if zlib.crc32(row.submit, row.first & 0xFFFFFFFF) != row.checksum:
        raise Damaged(f"the request with handle {row.first} does not have its checksum")
    try:
        return _submits.decode([row.submit])
    except DecodeError as error:
        raise Damaged(f"the request with handle {row.first}: {error}") from error


def check_rehandled(row: RehandledRow) -> None:
    """Raises Damaged unless the row is what was written."""
    if rehandled_row(row.first, row.request) != row:
        raise Damaged(f"the handles from {row.first} on do not have their checksum")


def columns_of(requests: Iterable[RestoredRequest]) -> Iterable[Columns]:
    """All tokens, logprobs and ends of ``requests``, in rows of about ``TOKENS_PER_ROW`` tokens."""
    parts: list[Columns] = []
    count = 0
    for request in requests:
        for index, tokens in enumerate(request.tokens):
            end = request.ends[index]
            entries = request.logprobs[index] if index < len(request.logprobs) else ()
            parts.append(
                Columns(
                    np.full(len(tokens), request.first_handle + index, dtype=np.int32),
                    np.arange(len(tokens), dtype=np.int32),
                    np.ascontiguousarray(tokens, dtype=np.int32),
                    np.arange(len(entries), dtype=np.int32),
                    entries,
                    () if end is None else (end,),
                )
            )
            count += len(tokens)
            if count >= TOKENS_PER_ROW:
                yield join_columns(parts)
                parts, count = [], 0
    if parts:
        yield join_columns(parts)


def join_columns(parts: list[Columns]) -> Columns:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    index = NO_NUMBERS
    if any(part.logprobs for part in parts):
        starts = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])], dtype=np.int32)
        index = np.concatenate([part.logprob_index + start for part, start in zip(parts, starts, strict=True)])
    return Columns(
        np.concatenate([part.handles for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        index,
        tuple(entry for part in parts for entry in part.logprobs),
        tuple(end for part in parts for end in part.ends),
    )


def _step_checksum(seq: int, blobs: tuple[bytes, ...]) -> int:
    checksum = zlib.crc32(_HEAD.pack(seq, *map(len, blobs)))
    for blob in blobs:
        checksum = zlib.crc32(blob, checksum)
    return checksum


def _blob(frames: list[Frame]) -> bytes:
    return bytes(frames[0])
