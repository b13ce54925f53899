"""Requests that another coordinator had accepted: from its journal, or from a client that knows more than we do."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.intake import Intake
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.readers import NOBODY
from drumline.engine.core.request import Place, Request, Sequence
from drumline.engine.core.restored import RestoredRequest
from drumline.engine.core.results import Emission
from drumline.protocol.errors import DrumlineError, DuplicateRequest, ErrorInfo, InvalidRequest, QueueFull
from drumline.protocol.messages import I32, NO_NUMBERS, LogprobEntry, Rejected, Resume, Resumed, Submit

if TYPE_CHECKING:
    from drumline.engine.core.request_book import RequestBook

DIVERGED = "diverged"
_NO_LOGPROBS = np.zeros(0, dtype=np.float32)


class TakeOver:
    """Makes requests with tokens that no step of this core has computed."""

    def __init__(self, book: RequestBook, config: CoreConfig, groups: Ordered[LockstepGroup], intake: Intake) -> None:
        self._book = book
        self._config = config
        self._groups = groups
        self._intake = intake

    # --------------------------------------------------------------------------------------------------------- journal

    def restore(self, requests: Iterable[RestoredRequest], now: float) -> None:
        """Requests of the coordinator before this one, in the order of their arrival; nobody reads them yet."""
        for one in requests:
            longest = len(one.submit.prompt) + max(map(len, one.tokens))
            request = self._intake.make(NOBODY, one.submit, longest)
            parts = zip(request.sequences, one.tokens, one.logprobs, one.ends, strict=True)
            for number, (sequence, tokens, logprobs, end) in enumerate(parts):
                sequence.stream = one.first_handle + number
                sequence.tokens = np.concatenate([request.prompt, tokens.astype(np.int32)])
                sequence.logprobs = list(logprobs)
                sequence.end = end
                if end is not None:
                    sequence.num_cached = end.num_cached_tokens
                    sequence.place = Place.ENDED
                    request.unended -= 1
                    request.aborted |= end.reason == "abort"
            self._intake.skip_handles(request.sequences[-1].stream)
            self._book.register.add(request)
            self._book.readers.detach(request, now)
            self._book.enqueue(request)
            for sequence in request.live:
                self._end_if_over(sequence)

    def snapshot(self) -> tuple[RestoredRequest, ...]:
        """Every request that has not been forgotten, as its outputs and notes have told so far: what has not been taken
        yet is left out."""
        pending, ending = self._book.outbox.pending()
        told = (one for one in self._book.register.by_id.values() if one.failed is None)
        return tuple(
            self._restorable(request, pending, ending)
            for request in told
            if request.request_id not in self._book.notes.accepted
        )

    def _restorable(self, request: Request, pending: dict[int, int], ending: set[int]) -> RestoredRequest:
        group, first = self._groups[request.group], len(request.prompt)
        tokens: list[I32] = []
        logprobs: list[tuple[LogprobEntry, ...]] = []
        for sequence in request.sequences:
            known = group.known_tokens(sequence)[first:]
            told = max(len(known) - pending.get(sequence.stream, 0), 0)
            tokens.append(known[:told])
            logprobs.append(tuple(sequence.logprobs[:told]))
        return RestoredRequest(
            submit=request.submit,
            first_handle=request.sequences[0].stream,
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
            ends=tuple(None if one.stream in ending else one.end for one in request.sequences),
        )

    # ---------------------------------------------------------------------------------------------------------- client

    def adopt(self, connection: int, msg: Resume) -> Resumed | Rejected:
        """Resumes a request of which the client may know more: one that is not known here is made of what it sent, and
        tokens that are not known here are taken from it. Where its tokens are not those known here, the request
        fails as ``diverged``."""
        submit = msg.submit
        try:
            if submit is None or submit.request_id != msg.request_id:
                raise InvalidRequest("submit", "none, or one of another request", "the submission of the request")
            request = self._book.register.by_id.get(msg.request_id)
            tokens = msg.tokens or (NO_NUMBERS,) * submit.n
            self._check_tokens(submit, tokens)
            if request is None:
                self._make(connection, submit, tokens)
            elif request.failed is None:
                self._extend(request, submit, tokens)
        except DrumlineError as error:
            if error.kind == DIVERGED:
                self._book.fail(msg.request_id, error.info)
            return Rejected(msg.call_id, msg.request_id, error.info)
        return self._book.readers.resume(connection, msg)

    def _check_tokens(self, submit: Submit, tokens: Ordered[I32]) -> None:
        self._book.check_fields(submit)
        if len(tokens) != submit.n:
            raise InvalidRequest("tokens", f"{len(tokens)} arrays", f"{submit.n}, one per index")
        for own in tokens:
            if own.ndim != 1 or own.dtype != np.int32 or len(own) > submit.max_tokens:
                raise InvalidRequest("tokens", f"{own.dtype} {own.shape}", f"int32, at most {submit.max_tokens}")
            if len(own) and own.view(np.uint32).max() >= self._config.vocab_size:
                raise InvalidRequest("tokens", f"{own.min()} to {own.max()}", f"0 to {self._config.vocab_size - 1}")

    def _make(self, connection: int, submit: Submit, tokens: Ordered[I32]) -> None:
        config = self._config
        # Whoever waits now may have been in a row of the coordinator before.
        most = config.max_waiting + config.max_num_seqs * config.num_replicas
        if self._book.waiting + submit.n > most:
            raise QueueFull(f"{self._book.waiting} sequences wait, of {most} that may be taken over")
        if not submit.seed_given:
            raise InvalidRequest("submit.seed_given", False, "true, with the seed that was drawn")
        request = self._intake.make(connection, submit, len(submit.prompt) + max(map(len, tokens)))
        for sequence, own in zip(request.sequences, tokens, strict=True):
            self._check_end(sequence, own)
        self._book.accept(request)
        for sequence, own in zip(request.sequences, tokens, strict=True):
            self._take(sequence, own, 0)
            self._end_if_over(sequence)

    def _extend(self, request: Request, submit: Submit, tokens: Ordered[I32]) -> None:
        before = request.submit
        if not np.array_equal(before.prompt, submit.prompt) or before.n != submit.n:
            raise DuplicateRequest(f"request id {submit.request_id!r} is that of another request")
        group, first = self._groups[request.group], len(request.prompt)
        longer: list[tuple[Sequence, I32, int]] = []
        for sequence, own in zip(request.sequences, tokens, strict=True):
            known = group.known_tokens(sequence)[first:]
            both = min(len(known), len(own))
            wrong = np.flatnonzero(known[:both] != own[:both])
            if len(wrong):
                raise _diverged(sequence, f"token {wrong[0]} is {known[wrong[0]]}, the client has {own[wrong[0]]}")
            if sequence.end is not None:
                # Who stopped or cancelled it may well have read more than it kept.
                if len(own) > len(known) and (sequence.end.reason == "length" or sequence.end.stop_token >= 0):
                    raise _diverged(sequence, f"it ended after {len(known)} tokens, the client has {len(own)}")
            elif len(own) > len(known):
                self._check_end(sequence, own)
                longer.append((sequence, own, len(known)))
        for sequence, own, known_tokens in longer:
            group.put_back(sequence)
            self._take(sequence, own, known_tokens)
            self._end_if_over(sequence)

    def _take(self, sequence: Sequence, tokens: I32, known: int) -> None:
        """The sequence, which is in no row, has these generated tokens, of which ``known`` have been told before."""
        request = sequence.request
        sequence.tokens = np.concatenate([request.prompt, tokens])
        sequence.late.clear()
        new = tokens[known:]
        logprobs: dict[int, LogprobEntry] = {}
        if request.sampling.logprobs >= 0:
            # The client has those of the tokens that it read; for others they are lost.
            logprobs = {i: _unknown_logprob(token) for i, token in enumerate(new.tolist())}
            sequence.logprobs.extend(logprobs.values())
        if len(new):
            # For the journal, which learns tokens from outputs alone.
            connections = np.full(len(new), NOBODY, dtype=np.int64)
            positions = np.arange(known, len(tokens), dtype=np.int32)
            streams = np.full(len(new), sequence.stream, dtype=np.int32)
            self._book.outbox.add_tokens([Emission(connections, streams, positions, new, logprobs)])

    def _check_end(self, sequence: Sequence, tokens: I32) -> None:
        ending = sequence.request.ending(sequence, tokens)
        if ending is not None and ending[0] < len(tokens):
            raise _diverged(sequence, f"the client has {len(tokens)} tokens of a sequence that ends after {ending[0]}")

    def _end_if_over(self, sequence: Sequence) -> None:
        request = sequence.request
        ending = request.ending(sequence, sequence.tokens[len(request.prompt) :])
        if ending is not None:
            num_tokens, reason, stop_token = ending
            if reason == "length":  # a replica may have become too small for what is there
                num_tokens = len(sequence.tokens) - len(request.prompt)
            self._groups[request.group].end(sequence)
            self._book.ended(sequence, reason, stop_token, num_tokens)


def _unknown_logprob(token: int) -> LogprobEntry:
    return LogprobEntry(token, float("nan"), 0, NO_NUMBERS, _NO_LOGPROBS)


def _diverged(sequence: Sequence, text: str) -> DrumlineError:
    message = f"request {sequence.request.request_id!r}, index {sequence.index}: {text}"
    return DrumlineError(message, ErrorInfo(kind=DIVERGED, text=message))
