"""The state of one request as its reader sees it: tokens in, outputs out.

Nothing here waits or sends; the reader waits for ``changed``. Frames put tokens in by position, so that a repeat is
dropped and a gap is told; the reader takes whatever is new since it took last, so a slow reader gets fewer and larger
deltas and nothing queues up behind it: what is kept is the output itself, which max_tokens bounds.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence

from drumline.engine.detokenizer import Detokenizer, IncrementalText, TextDecoder
from drumline.engine.outputs import Logprob, RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import LogprobEntry, StreamEnd, Submit


class Arrival(enum.Enum):
    """What a token turned out to be."""

    NEW = "new"
    MATCHED = "matched"
    """New, and it completed a stop string: the engine should be told to compute no further."""
    REPEAT = "repeat"
    """A position that was there already, or one past the end."""
    GAP = "gap"
    """Tokens before it are missing: ask for them."""


class SequenceStream:
    """One of the ``n`` sequences of a request."""

    def __init__(self, index: int, detokenizer: Detokenizer | None, *, with_logprobs: bool) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = [] if with_logprobs else None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.closed = False
        self.end: StreamEnd | None = None
        self._detokenizer = detokenizer
        self._settled: list[int] = []

    def receive(self, position: int, token: int, logprobs: dict[int, Logprob] | None) -> Arrival:
        """Takes the token at ``position`` (0 is the first generated one)."""
        if self.finish_reason is not None or position < len(self.token_ids):
            return Arrival.REPEAT
        if position > len(self.token_ids):
            return Arrival.GAP
        self.token_ids.append(token)
        if self.logprobs is not None:
            self.logprobs.append(logprobs if logprobs is not None else {})
        matched = self._detokenizer.push(token) if self._detokenizer is not None else None
        self._settled.append(self._detokenizer.settled if self._detokenizer is not None else 0)
        if matched is not None:
            self._finish("stop", matched)
            return Arrival.MATCHED
        return Arrival.NEW

    def receive_end(self, end: StreamEnd, eos: frozenset[int]) -> Arrival:
        """The engine computes no further. Its end counts once all its tokens are here (a stop string's comes first)."""
        self.end = end
        if self.finish_reason is None and end.num_tokens > len(self.token_ids):
            return Arrival.GAP
        self.closed = True
        if self.finish_reason is None:
            stop_token = end.stop_token if end.stop_token >= 0 and end.stop_token not in eos else None
            self._finish(end.reason, stop_token)
        return Arrival.NEW

    def abort(self) -> None:
        """The request was cancelled: a sequence that still ran ends here."""
        self.closed = True
        if self.finish_reason is None:
            self._finish("abort", None)

    def _finish(self, reason: str, stop_reason: str | int | None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        if self._detokenizer is not None:
            self._detokenizer.finish()

    @property
    def text(self) -> str:
        """All text that may be given out by now."""
        return self._detokenizer.text[: self._detokenizer.settled] if self._detokenizer is not None else ""

    def text_length_at(self, position: int) -> int:
        """How many characters had been given out once ``position`` tokens were there."""
        return self._settled[position - 1] if position > 0 else 0


class _Cursor:
    """How far a reader has come in one sequence."""

    __slots__ = ("finished", "text", "tokens")

    def __init__(self, tokens: int = 0, text: int = 0) -> None:
        self.tokens = tokens
        self.text = text
        self.finished = False


class RequestStream:
    """All sequences of one request, and where its reader stands in each.

    ``changed`` is set whenever there may be news for the reader, ``released`` once the engine is through with the
    request and its id is free. ``submit``: as it is to be said again to another coordinator, with the seed that was
    drawn once it is ``accepted``; ``repeated``: it was said more than once and is not answered. ``resuming_since``:
    when a Resume was sent that is not answered yet. ``reader`` numbers the readers, of whom the newest wins; ``left``:
    the reader has gone before the end.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: TextDecoder | None,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.num_cached_tokens = 0
        self.error: ErrorInfo | None = None
        self.submit: Submit | None = None
        self.accepted = False
        self.repeated = False
        self.resuming_since: float | None = None
        self.reader = 0
        self.left = False
        self.changed = asyncio.Event()
        self.released = asyncio.Event()
        self._tokenizer = tokenizer
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.sequences = [self._sequence(index) for index in range(params.n)]
        self._cursors = [_Cursor() for _ in self.sequences]

    def _sequence(self, index: int) -> SequenceStream:
        params = self.params
        detokenizer = None
        if self._tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                IncrementalText(self._tokenizer, self.prompt_ids, skip_special_tokens=params.skip_special_tokens),
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                hidden_ids=self._eos | frozenset(params.stop_token_ids or ()),
            )
        return SequenceStream(index, detokenizer, with_logprobs=params.logprobs is not None)

    # -- what arrives

    def receive(self, index: int, position: int, token: int, entry: LogprobEntry | None) -> Arrival:
        """Takes one token; see :class:`Arrival`. While a Resume is under way a gap is expected and tells nothing."""
        self.changed.set()
        logprobs = self._logprobs(entry) if entry is not None else None
        arrival = self.sequences[index].receive(position, token, logprobs)
        if arrival is Arrival.GAP and self.resuming_since is not None:
            return Arrival.REPEAT
        return arrival

    def receive_end(self, end: StreamEnd) -> Arrival:
        """Takes the end of the sequence ``end.index``."""
        self.changed.set()
        self.num_cached_tokens = max(self.num_cached_tokens, end.num_cached_tokens)
        arrival = self.sequences[end.index].receive_end(end, self._eos)
        return Arrival.REPEAT if arrival is Arrival.GAP and self.resuming_since is not None else arrival

    def abort(self) -> None:
        """Ends what still runs; the engine confirmed a cancel."""
        self.changed.set()
        for sequence in self.sequences:
            sequence.abort()

    def fail(self, error: ErrorInfo) -> None:
        """The reader gets what is there, then ``error``. The first error stays."""
        self.changed.set()
        if self.error is None:
            self.error = error

    def release(self) -> None:
        """The id is free; a reader that still waits has its last news."""
        self.released.set()
        self.changed.set()

    def _logprobs(self, entry: LogprobEntry) -> dict[int, Logprob]:
        found = {entry.token: self._logprob(entry.token, entry.logprob, entry.rank)}
        best = zip(entry.top_tokens.tolist(), entry.top_logprobs.tolist(), strict=True)
        for rank, (token, logprob) in enumerate(best, 1):
            if token != entry.token:
                found[token] = self._logprob(token, logprob, rank)
        return found

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        text = self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer is not None else ""
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)

    # -- what the reader sees

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens received of each sequence: where a Resume goes on."""
        return tuple(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def finished(self) -> bool:
        """Every sequence has ended for the reader, who may leave."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def closed(self) -> bool:
        """Every sequence has ended in the engine too: the request id is free."""
        return all(sequence.closed for sequence in self.sequences)

    @property
    def matched(self) -> list[tuple[int, int]]:
        """Index and tokens of each sequence that a stop string or token has ended for its reader."""
        return [
            (sequence.index, len(sequence.token_ids))
            for sequence in self.sequences
            if sequence.finish_reason == "stop" and sequence.token_ids
        ]

    def rewind(self, positions: Sequence[int]) -> None:
        """A new reader: the next :meth:`take` starts at ``positions``, one for each sequence, at most what is here."""
        self.reader += 1
        self.changed.set()
        self._cursors = [
            _Cursor(position, sequence.text_length_at(position))
            for position, sequence in zip(positions, self.sequences, strict=True)
        ]

    def take(self) -> list[RequestOutput]:
        """One event for each sequence with news since the last call, in order of index."""
        return [
            self._news(sequence, cursor)
            for sequence, cursor in zip(self.sequences, self._cursors, strict=True)
            if len(sequence.token_ids) > cursor.tokens or (sequence.finish_reason is not None and not cursor.finished)
        ]

    def _news(self, sequence: SequenceStream, cursor: _Cursor) -> RequestOutput:
        text = sequence.text
        output = RequestOutput(
            request_id=self.request_id,
            index=sequence.index,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            token_ids=sequence.token_ids.copy(),
            token_ids_delta=sequence.token_ids[cursor.tokens :],
            text=text,
            text_delta=text[cursor.text :],
            logprobs=None if sequence.logprobs is None else sequence.logprobs.copy(),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            num_cached_tokens=self.num_cached_tokens,
            finished=sequence.finish_reason is not None,
        )
        cursor.tokens = len(sequence.token_ids)
        cursor.text = len(text)
        cursor.finished = sequence.finish_reason is not None
        return output
