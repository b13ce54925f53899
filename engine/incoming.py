"""What the messages of a coordinator mean to the calls and the requests of one connection. Opens no socket, reads no
clock; what is to be answered is returned."""

from __future__ import annotations

from collections.abc import Callable

from drumline.engine.inbox import Inbox
from drumline.engine.open_calls import OpenCalls
from drumline.engine.streams import RequestStream
from drumline.protocol.errors import RequestFailed
from drumline.protocol.messages import (
    Accepted,
    Behind,
    CallRanksResult,
    Cancel,
    Cancelled,
    ExpertLoad,
    ExpertsRebalanced,
    Failed,
    FaultsInjected,
    Finished,
    FromClient,
    LayoutFacts,
    Rejected,
    Resumed,
    StatusReport,
    Tokens,
)

Answer = (
    Tokens
    | Finished
    | Behind
    | Resumed
    | Accepted
    | Rejected
    | Cancelled
    | Failed
    | StatusReport
    | CallRanksResult
    | LayoutFacts
    | FaultsInjected
    | ExpertsRebalanced
    | ExpertLoad
)


class Incoming:
    """``calls`` wait for answers, ``inbox`` holds the requests. ``attaching``: what makes the stream of a request that
    another connection had, by the id of the call that asks for it."""

    def __init__(self) -> None:
        self.calls = OpenCalls()
        self.inbox = Inbox(self.calls.next_id)
        self.attaching: dict[int, Callable[[Resumed], RequestStream]] = {}
        self._cancels: dict[int, tuple[str, RequestStream | None]] = {}

    def cancelling(self, message: Cancel) -> None:
        """To be told of every cancel: by the time of its confirmation the id may be that of another request."""
        self._cancels[message.call_id] = message.request_id, self.inbox.requests.get(message.request_id)

    def come_back(self, now: float, term: int, knows_all: bool) -> list[FromClient]:
        """What to tell a coordinator that has taken over."""
        answers = [*self.calls.repeat(now), *self.inbox.come_back(now, term, knows_all)]
        return answers + [Cancel(call_id, request_id) for call_id, (request_id, _) in self._cancels.items()]

    def take(self, message: Answer, now: float) -> list[FromClient]:
        """One message, and what to answer to it."""
        match message:
            case Tokens():
                return self.inbox.tokens(message, now)
            case Finished():
                return self.inbox.finished(message, now)
            case Behind():
                return self.inbox.behind(now)
            case Resumed():
                return self._resumed(message)
            case Accepted():
                answers = self.inbox.accepted(message, now)
                self.calls.answer(message.call_id, message)
                return answers
            case Rejected():
                self._rejected(message)
            case Failed():
                self.inbox.fail(message.request_id, message.error)
            case Cancelled():
                _, stream = self._cancels.pop(message.call_id, ("", None))
                self.inbox.cancelled(stream)
                self.calls.answer(message.call_id, message)
            case (
                StatusReport()
                | CallRanksResult()
                | LayoutFacts()
                | FaultsInjected()
                | ExpertsRebalanced()
                | ExpertLoad()
            ):
                self.calls.answer(message.call_id, message)
        return []

    def _resumed(self, message: Resumed) -> list[FromClient]:
        make = self.attaching.pop(message.call_id, None)
        stream = self.inbox.requests.get(message.request_id)
        if make is not None and stream is None:
            try:
                stream = make(message)
            except Exception as error:  # what another client library made of its parameters may not be ours
                text = f"request {message.request_id!r} cannot be read here: {error}"
                self.calls.reject(message.call_id, RequestFailed(text).info)
                return []
            self.inbox.attach(stream)
        answers = self.inbox.resumed(message)
        self.calls.answer(message.call_id, stream)
        return answers

    def _rejected(self, message: Rejected) -> None:
        self._cancels.pop(message.call_id, None)
        self.attaching.pop(message.call_id, None)
        if not self.calls.reject(message.call_id, message.error):
            self.inbox.rejected(message)
