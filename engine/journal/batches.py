"""What is written down at once: everything that happened to requests since the last batch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.journal.rows import Columns, join_columns
from drumline.protocol.messages import I32, NO_NUMBERS, LogprobEntry, StreamEnd, Submit

LOGPROB_BYTES = 128
"""What a logprob entry is counted as."""
END_BYTES = 64
REQUEST_BYTES = 256


class Batch(msgspec.Struct):
    """Applied in this order: ``forgotten`` requests go, ``accepted`` ones come, ``rehandled`` ones go on under other
    handles (all as in Notes), then tokens: entry i of ``handles``, ``positions`` and ``tokens`` (int32, of one length)
    is the token at one output position of a stream. ``logprobs[k]`` belongs to entry ``logprob_index[k]``. ``ends``
    come last.
    """

    accepted: Sequence[tuple[Submit, int]] = ()
    rehandled: Sequence[tuple[str, int]] = ()
    forgotten: Sequence[str] = ()
    handles: I32 = NO_NUMBERS
    positions: I32 = NO_NUMBERS
    tokens: I32 = NO_NUMBERS
    logprob_index: I32 = NO_NUMBERS
    logprobs: tuple[LogprobEntry, ...] = ()
    ends: tuple[StreamEnd, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write down."""
        return not (len(self.handles) or self.ends or self.accepted or self.forgotten or self.rehandled)

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes, in memory and on disk."""
        size = 3 * self.handles.nbytes + LOGPROB_BYTES * len(self.logprobs) + END_BYTES * len(self.ends)
        for submit, _ in self.accepted:
            size += submit.prompt.nbytes + len(submit.client_params) + REQUEST_BYTES
        return size + REQUEST_BYTES * (len(self.rehandled) + len(self.forgotten))


def make_batch(notes: Notes | None, outputs: Sequence[ConnectionOutput]) -> Batch:
    """Everything of ``notes`` and of what goes to connections."""
    batch = Batch()
    if notes is not None:
        batch.accepted, batch.rehandled, batch.forgotten = notes.accepted, notes.rehandled, notes.forgotten
    if outputs:
        told = join_columns([_columns(one) for one in outputs])
        batch.handles, batch.positions, batch.tokens, batch.logprob_index, batch.logprobs, batch.ends = told
    return batch


def _columns(one: ConnectionOutput) -> Columns:
    return Columns(one.handles, one.positions, one.tokens, one.logprob_index, one.logprobs, tuple(one.ends))
