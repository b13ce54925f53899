"""Calls of a client that wait for their answer, and what becomes of them when another coordinator takes over."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drumline.protocol.errors import ErrorInfo, RequestFailed, from_info
from drumline.protocol.messages import Cancel, ExpertLoadQuery, FromClient, LayoutQuery, Resume, StatusQuery, Submit

REPEATABLE = (Submit, Cancel, Resume, StatusQuery, LayoutQuery, ExpertLoadQuery)
"""What may be said twice: the same submission is known by its nonce, the others change nothing the second time."""


@dataclass(slots=True)
class OpenCall:
    """``sent_at``: when it was said last, None while no coordinator has been there to hear it."""

    message: FromClient
    answer: asyncio.Future[Any]
    sent_at: float | None = None


class OpenCalls:
    """By call id. Ids are numbered from 1, each once on a connection: by it an answer finds its question."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._open: dict[int, OpenCall] = {}

    def next_id(self) -> int:
        """An id that was not used before."""
        return next(self._ids)

    def open(self, make: Callable[[int], FromClient]) -> tuple[int, OpenCall]:
        """A call whose message ``make`` makes of its id."""
        call_id = self.next_id()
        call = OpenCall(make(call_id), asyncio.get_running_loop().create_future())
        self._open[call_id] = call
        return call_id, call

    def close(self, call_id: int) -> None:
        """Its caller waits no longer."""
        self._open.pop(call_id, None)

    def answer(self, call_id: int, answer: object) -> None:
        """A late answer, whose caller has given up, is dropped."""
        call = self._open.pop(call_id, None)
        if call is not None and not call.answer.done():
            call.answer.set_result(answer)

    def reject(self, call_id: int, error: ErrorInfo) -> bool:
        """The answer is an error. Whether somebody waited for it."""
        call = self._open.pop(call_id, None)
        if call is None:
            return False
        if not call.answer.done():
            call.answer.set_exception(from_info(error))
        return True

    def reject_all(self, error: ErrorInfo) -> None:
        """Every answer is this error."""
        for call_id in list(self._open):
            self.reject(call_id, error)

    def repeat(self, now: float) -> list[FromClient]:
        """Another coordinator is there: what to say to it; submissions and cancels are said by those who hold the
        requests. What it must not be told a second time fails; the same again may succeed."""
        again: list[FromClient] = []
        for call_id, call in list(self._open.items()):
            if call.sent_at is None or isinstance(call.message, REPEATABLE):
                if not isinstance(call.message, Submit | Cancel):
                    call.sent_at = now
                    again.append(call.message)
                continue
            name = type(call.message).__name__
            text = f"the coordinator was lost before it answered {name}: whether it was carried out is not known"
            self.reject(call_id, RequestFailed(text).info)
        return again

    def late(self, now: float, limit_s: float) -> list[Submit]:
        """Submissions said longer than ``limit_s`` ago."""
        return [
            call.message
            for call in self._open.values()
            if isinstance(call.message, Submit) and call.sent_at is not None and now - call.sent_at > limit_s
        ]

    def sent(self, message: FromClient, now: float) -> None:
        """A message of a call has been said."""
        call = self._open.get(getattr(message, "call_id", 0))
        if call is not None:
            call.sent_at = now
