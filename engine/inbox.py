"""What the coordinator's messages mean to the requests of one connection. Opens no socket and reads no clock.

Every method that may have something to answer returns the messages to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from drumline.engine.streams import Arrival, RequestStream
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    I32,
    Accepted,
    Ack,
    Finished,
    FromClient,
    Rejected,
    Resume,
    Resumed,
    Stop,
    Submit,
    Tokens,
)

# The coordinator sends nothing more with 64 frames unacknowledged.
ACK_EVERY = 16
ACK_UNSURE_S = 3.0
"""An acknowledgement that was sent so long before a coordinator was lost has been taken note of."""
MAX_ENDED = 1024


class Inbox:
    """The live requests of a connection, by id and by stream handle.

    ``next_call_id`` numbers the Resumes. ``statistics`` counts tokens and frames, and what was dropped or missing.
    """

    def __init__(self, next_call_id: Callable[[], int]) -> None:
        self.requests: dict[str, RequestStream] = {}
        self.statistics = dict.fromkeys(("frames", "tokens", "repeats", "gaps", "unknown_handles", "resumes"), 0)
        self._next_call_id = next_call_id
        self._handles: dict[int, tuple[RequestStream, int]] = {}
        self._handles_of: dict[str, tuple[int, ...]] = {}
        self._last_frame: int | None = None
        self._acknowledged: int | None = None
        self._term = 0
        self._ended: deque[tuple[str, tuple[int, ...], float]] = deque(maxlen=MAX_ENDED)

    # -- requests come and go

    def add(self, stream: RequestStream) -> None:
        """A request that is being submitted. Its handles come with :meth:`accepted`."""
        self.requests[stream.request_id] = stream

    def attach(self, stream: RequestStream) -> None:
        """A request that the engine has taken in already, from another connection. Its Resumed follows."""
        stream.accepted = True
        self.add(stream)

    def repeated(self, submits: Iterable[Submit]) -> list[FromClient]:
        """Submissions that are to be said again, since they were not answered."""
        answers: list[FromClient] = []
        for submit in submits:
            stream = self.requests.get(submit.request_id)
            if stream is not None:
                stream.repeated = True
                answers.append(submit)
        return answers

    def remove(self, stream: RequestStream) -> None:
        """Forgets a request that has ended in the engine, or never began: its id is free."""
        if self.requests.get(stream.request_id) is stream:
            del self.requests[stream.request_id]
            self._unbind(stream.request_id)
        stream.release()

    def accepted(self, message: Accepted, now: float) -> list[FromClient]:
        """The engine has taken the request in: its tokens come under these handles, one per index."""
        stream = self.requests.get(message.request_id)
        if stream is None:
            return []
        stream.num_cached_tokens = message.num_cached_tokens
        self.adopt(stream, message.handles.tolist(), message.seed)
        if not stream.repeated:
            return []
        # It may have been taken in the first time already: what it has given since is asked for.
        stream.repeated = False
        return self._resume(stream, now)

    def adopt(self, stream: RequestStream, handles: list[int], seed: int) -> None:
        """The engine has the request; its tokens come under these handles."""
        stream.accepted = True
        if stream.submit is not None:
            sampling = msgspec.structs.replace(stream.submit.sampling, seed=seed)
            stream.submit = msgspec.structs.replace(stream.submit, sampling=sampling, seed_given=True)
        self._bind(stream, handles)

    def cancelled(self, stream: RequestStream | None) -> None:
        """The engine has freed the request that a cancel meant: whatever still ran of it ends as aborted."""
        if stream is not None and self.requests.get(stream.request_id) is stream:
            stream.abort()
            self.remove(stream)

    def fail(self, request_id: str, error: ErrorInfo) -> None:
        """The request ends with ``error``, after what is still to be read. An id that is not live is ignored."""
        stream = self.requests.get(request_id)
        if stream is not None:
            stream.fail(error)
            self.remove(stream)

    def rejected(self, message: Rejected) -> None:
        """A Resume, or a submission whose reader has left, was refused."""
        stream = self.requests.get(message.request_id)
        if stream is None or stream.resuming_since is None:
            return
        error = message.error
        if error.kind in ("invalid_request", "duplicate_request"):
            # It was taken in once: it is the engine that does not know it any more.
            whom = f"the coordinator of term {self._term}" if self._term else "the coordinator"
            text = f"request {message.request_id!r} is lost to {whom}: {error.text}"
            error = ErrorInfo(kind="request_failed", text=text, retryable=True)
        self.fail(message.request_id, error)

    def fail_all(self, error: ErrorInfo) -> None:
        """:meth:`fail` for every live request."""
        for request_id in list(self.requests):
            self.fail(request_id, error)

    # -- frames

    def tokens(self, message: Tokens, now: float) -> list[FromClient]:
        """Tokens to their streams. Answers: a Stop where a stop string is complete, a Resume where tokens are missing,
        an Ack when one is due."""
        answers = self._count_frame(message.frame, now)
        self.statistics["tokens"] += len(message.tokens)
        entries = dict(zip(message.logprob_index.tolist(), message.logprobs, strict=False))
        arrived = zip(message.handles.tolist(), message.positions.tolist(), message.tokens.tolist(), strict=False)
        for place, (handle, position, token) in enumerate(arrived):
            known = self._handles.get(handle)
            if known is None:
                self.statistics["unknown_handles"] += 1
                continue
            stream, index = known
            arrival = stream.receive(index, position, token, entries.get(place))
            if arrival is Arrival.MATCHED:
                answers.append(Stop(stream.request_id, index, position + 1))
            elif arrival is Arrival.REPEAT:
                self.statistics["repeats"] += 1
            elif arrival is Arrival.GAP:
                answers += self._gap(stream, now)
        return answers

    def finished(self, message: Finished, now: float) -> list[FromClient]:
        """Ends. They are acknowledged at once, so that the engine can forget the request and its id is free."""
        answers = self._count_frame(message.frame, now)
        for end in message.ends:
            stream = self.requests.get(end.request_id)
            if stream is None or not 0 <= end.index < len(stream.sequences):
                self.statistics["unknown_handles"] += 1
            elif stream.receive_end(end) is Arrival.GAP:
                answers += self._gap(stream, now)
            elif stream.closed:
                if stream.submit is not None and stream.submit.durable:
                    self._ended.append((stream.request_id, stream.positions, now))
                self.remove(stream)
        return [*answers, *self.acknowledge()]

    def behind(self, now: float) -> list[FromClient]:
        """Frames were left out: everything that is live is asked for again."""
        answers = self.acknowledge()
        self._last_frame = None
        self._acknowledged = None
        return answers + self._resume_all(now)

    def resumed(self, message: Resumed) -> list[FromClient]:
        """All tokens so far of one request, and new handles; what is here already is passed over."""
        stream = self.requests.get(message.request_id)
        if stream is None:
            return []
        stream.resuming_since = None
        self._bind(stream, message.handles.tolist())
        ended = {end.index for end in message.ends}
        # A stop that was told to another coordinator may have died with it.
        answers: list[FromClient] = [
            Stop(stream.request_id, index, tokens) for index, tokens in stream.matched if index not in ended
        ]
        for index, tokens in enumerate(message.tokens[: len(stream.sequences)]):
            entries = message.logprobs[index] if index < len(message.logprobs) else ()
            for position in range(len(stream.sequences[index].token_ids), len(tokens)):
                entry = entries[position] if position < len(entries) else None
                arrival = stream.receive(index, position, int(tokens[position]), entry)
                if arrival is Arrival.MATCHED:
                    answers.append(Stop(stream.request_id, index, position + 1))
                    break
        for end in message.ends:
            if 0 <= end.index < len(stream.sequences):
                stream.receive_end(end)
        if stream.closed:
            self.remove(stream)
        return answers

    # -- another coordinator

    def disconnected(self, now: float) -> None:
        """The connection is lost: frames and handles were its own, and no answer comes any more."""
        while self._ended and now - self._ended[0][2] > ACK_UNSURE_S:
            self._ended.popleft()
        self._last_frame = None
        self._acknowledged = None
        for request_id in list(self._handles_of):
            self._unbind(request_id)
        for stream in self.requests.values():
            stream.resuming_since = None

    def come_back(self, now: float, term: int, knows_all: bool) -> list[FromClient]:
        """What a coordinator must be told that has taken over: submissions that were not accepted once more, and from
        where on the accepted ones go on. To one that may not know all, all that is known here."""
        self._term = term
        answers: list[FromClient] = []
        for stream in self.requests.values():
            if stream.accepted:
                answers += self._resume(stream, now, None if knows_all else stream.submit)
            elif stream.submit is not None:
                stream.repeated = True
                answers.append(stream.submit)
        # That the last ends were read may have died with the other one, and their ids would stay taken.
        answers += [
            Resume(self._next_call_id(), request_id, positions)
            for request_id, positions, _ in self._ended
            if request_id not in self.requests
        ]
        self._ended.clear()
        return answers

    def acknowledge(self) -> list[FromClient]:
        """An Ack for everything read, or nothing when all is acknowledged."""
        if self._last_frame is None or self._last_frame == self._acknowledged:
            return []
        self._acknowledged = self._last_frame
        return [Ack(self._last_frame)]

    def overdue(self, now: float, limit_s: float) -> Iterable[RequestStream]:
        """Requests whose Resume has gone unanswered for ``limit_s``."""
        return [
            stream
            for stream in self.requests.values()
            if stream.resuming_since is not None and now - stream.resuming_since > limit_s
        ]

    def _count_frame(self, frame: int, now: float) -> list[FromClient]:
        self.statistics["frames"] += 1
        last = self._last_frame
        if last is not None and frame <= last:
            return []
        self._last_frame = frame
        if self._acknowledged is None:
            self._acknowledged = frame - 1
        # Tokens would show a gap of their own at the next position, but the end of a request would be missed.
        answers = self._resume_all(now) if last is not None and frame != last + 1 else []
        return answers + (self.acknowledge() if frame - self._acknowledged >= ACK_EVERY else [])

    def _resume_all(self, now: float) -> list[FromClient]:
        answers: list[FromClient] = []
        for stream in list(self.requests.values()):
            if stream.request_id in self._handles_of:
                answers += self._gap(stream, now)
        return answers

    def _gap(self, stream: RequestStream, now: float) -> list[FromClient]:
        self.statistics["gaps"] += 1
        return self._resume(stream, now)

    def _resume(self, stream: RequestStream, now: float, submit: Submit | None = None) -> list[FromClient]:
        if stream.resuming_since is not None:
            return []
        stream.resuming_since = now
        self.statistics["resumes"] += 1
        tokens: tuple[I32, ...] = ()
        if submit is not None:
            tokens = tuple(np.array(sequence.token_ids, dtype=np.int32) for sequence in stream.sequences)
        return [Resume(self._next_call_id(), stream.request_id, stream.positions, tokens, submit)]

    def _bind(self, stream: RequestStream, handles: list[int]) -> None:
        self._unbind(stream.request_id)
        self._handles_of[stream.request_id] = tuple(handles)
        for index, handle in enumerate(handles[: len(stream.sequences)]):
            self._handles[handle] = (stream, index)

    def _unbind(self, request_id: str) -> None:
        for handle in self._handles_of.pop(request_id, ()):
            self._handles.pop(handle, None)
