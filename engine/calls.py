"""Control calls to all ranks on behalf of a client, each with a deadline of its own; no I/O.

Every call to a rank has an id of its own, so that a late reply is dropped and counted, never taken for another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Call, CallRanks, CallRanksResult, CallResult, RankAnswer

MAX_UNANSWERED = 8
"""Calls that a rank may owe answers to, given up ones included: what waits in a rank waits beside its steps."""
MAX_TIMEOUT_S = 3600.0
MAX_METHOD_CHARACTERS = 100
MAX_RESULTS_BYTES = 48 << 20
"""Of all ranks together: they travel to the client in one frame."""


@dataclass(slots=True)
class OpenCall:
    """A call of one client. ``waiting``: rank by the call id that it was sent under."""

    connection: int
    client_call_id: int
    method: str
    deadline: float
    timeout_s: float
    waiting: dict[int, int] = field(default_factory=dict)
    answers: dict[int, RankAnswer] = field(default_factory=dict)

    def result(self) -> CallRanksResult:
        """The answers so far, by ascending rank, under the id that the client gave. Values beyond what one frame
        holds, counted from the lowest rank, are errors."""
        answers: list[RankAnswer] = []
        room = MAX_RESULTS_BYTES
        for rank, answer in sorted(self.answers.items()):
            room -= len(answer.value)
            if room < 0:
                text = (
                    f"the result of rank {rank} has {len(answer.value)} bytes of msgpack; the results of all ranks "
                    f"together may have {MAX_RESULTS_BYTES}"
                )
                error = ErrorInfo(kind="invalid_request", text=text, rank=rank, field=f"the result of {self.method}")
                answers.append(RankAnswer(rank, False, b"", error))
            else:
                answers.append(answer)
        return CallRanksResult(self.client_call_id, tuple(answers))


class RankCalls:
    """Calls in flight. Methods return the calls that are complete, with the connection to tell."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._next_id = 1
        self._by_id: dict[int, OpenCall] = {}
        self._owed: dict[int, tuple[int, set[int]]] = {}
        self.late_replies = 0

    def __len__(self) -> int:
        """Calls to single ranks that somebody waits for."""
        return len(self._by_id)

    def owed(self, rank: int) -> int:
        """Calls that ``rank`` has yet to answer, whether or not somebody still waits for them."""
        return len(self._owed[rank][1]) if rank in self._owed else 0

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of the calls in flight, None without any."""
        return min((call.deadline for call in self._by_id.values()), default=None)

    def open(
        self, connection: int, message: CallRanks, epochs: Mapping[int, int], now: float
    ) -> tuple[OpenCall, list[tuple[int, Call]]] | ErrorInfo:
        """Call every rank of ``epochs`` (epoch by rank). Returns the call and what to send, or why it is refused."""
        if not 0 < len(message.method) <= MAX_METHOD_CHARACTERS:
            return _refusal("method", message.method[:200], f"a name of 1 to {MAX_METHOD_CHARACTERS} characters")
        if not 0.0 < message.timeout_s <= MAX_TIMEOUT_S:
            return _refusal("timeout_s", repr(message.timeout_s), f"above 0, at most {MAX_TIMEOUT_S:g}")
        for rank, epoch in epochs.items():
            if len(self._owed_in(rank, epoch)) >= MAX_UNANSWERED:
                text = f"rank {rank} has {MAX_UNANSWERED} calls to answer, the most it may have"
                return ErrorInfo(kind="queue_full", text=text, retryable=True, rank=rank)
        call = OpenCall(connection, message.call_id, message.method, now + message.timeout_s, message.timeout_s)
        sends: list[tuple[int, Call]] = []
        for rank, epoch in epochs.items():
            call_id = self._next_id
            self._next_id += 1
            call.waiting[call_id] = rank
            self._by_id[call_id] = call
            self._owed_in(rank, epoch).add(call_id)
            sends.append((rank, Call(self._term, epoch, call_id, message.method, message.args)))
        return call, sends

    def _owed_in(self, rank: int, epoch: int) -> set[int]:
        """The calls that ``rank`` owes. It answers none of an older epoch any more, so those do not count."""
        entry = self._owed.get(rank)
        if entry is None or entry[0] != epoch:
            entry = self._owed[rank] = (epoch, set())
        return entry[1]

    def answer(self, message: CallResult) -> OpenCall | None:
        """A rank answered. Returns the call if that completes it."""
        _, owed = self._owed.get(message.rank, (0, set[int]()))
        owed.discard(message.call_id)
        call = self._by_id.get(message.call_id)
        if call is None or call.waiting.get(message.call_id) != message.rank:
            self.late_replies += 1
            return None
        answer = RankAnswer(message.rank, message.ok, message.value, message.error)
        return self._settle(call, message.call_id, answer)

    def unreachable(self, rank: int, text: str, *, retryable: bool = False) -> list[OpenCall]:
        """``rank`` will not answer to anything. Returns the calls that this completes."""
        self._owed.pop(rank, None)
        lost = [(call_id, call) for call_id, call in self._by_id.items() if call.waiting.get(call_id) == rank]
        error = ErrorInfo(kind="request_failed", text=text, rank=rank, retryable=retryable)
        done = [self._settle(call, call_id, RankAnswer(rank, False, b"", error)) for call_id, call in lost]
        return [call for call in done if call is not None]

    def expire(self, now: float) -> list[OpenCall]:
        """Calls whose deadline has passed, complete with an error for every rank that did not answer."""
        late = {id(call): call for call in self._by_id.values() if call.deadline <= now}
        for call in late.values():
            for call_id, rank in list(call.waiting.items()):
                text = f"rank {rank} did not answer {call.method} within {call.timeout_s:g} s"
                error = ErrorInfo(kind="request_failed", text=text, rank=rank, retryable=True)
                self._settle(call, call_id, RankAnswer(rank, False, b"", error))
        return list(late.values())

    def drop_connection(self, connection: int) -> None:
        """The client is gone: what still comes for it counts as late."""
        for call_id in [call_id for call_id, call in self._by_id.items() if call.connection == connection]:
            del self._by_id[call_id]

    def _settle(self, call: OpenCall, call_id: int, answer: RankAnswer) -> OpenCall | None:
        call.waiting.pop(call_id, None)
        self._by_id.pop(call_id, None)
        call.answers[answer.rank] = answer
        return call if not call.waiting else None


def _refusal(name: str, found: str, valid: str) -> ErrorInfo:
    text = f"{name}: found {found}; valid: {valid}"
    return ErrorInfo(kind="invalid_request", text=text, field=name, found=found, valid=valid)
