"""The control thread against a socket that has no room for a while."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from drumline.protocol.messages import Call, CallResult, Message, StepDone, ToWorker
from drumline.protocol.sockets import SendResult
from drumline.workers import connection
from drumline.workers.control import Control
from drumline.workers.identity import Identity

NONE = np.zeros(0, dtype=np.int32)
DEADLINE_S = 5.0


class FullSocket:
    """Takes its first message, then ``refusals`` times nothing, then everything; ``told`` is read one at a time."""

    def __init__(self, refusals: int) -> None:
        self.sent: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.refused: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self.parked = False
        self._refusals = refusals

    def poll(self, others: Sequence[int], timeout_s: float) -> set[int]:
        # A control thread that is done with would end the process for want of a welcome.
        threading.Event().wait(None if self.parked else min(timeout_s, 0.01))
        return set()

    def recv_nowait(self) -> ToWorker | None:
        try:
            return self.told.get_nowait()
        except queue.Empty:
            return None

    def send(self, message: Message) -> SendResult:
        if isinstance(message, StepDone) and self._refusals:
            self._refusals -= 1
            self.refused.put(message)
            return SendResult.FULL
        self.sent.put(message)
        return SendResult.SENT


def test_an_answer_to_a_call_does_not_displace_a_reply_that_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    socket = FullSocket(refusals=2)
    monkeypatch.setattr(connection, "ThreadDealer", lambda *_: socket)
    read_end, write_end = os.pipe()
    try:
        one = Control(Identity(0, "x", "t"), "ipc:///nowhere", None, read_end)
        one.start()
        hello = socket.sent.get(timeout=DEADLINE_S)
        done = StepDone(1, 1, 0, 0, NONE, NONE)
        one.send(done)
        socket.refused.get(timeout=DEADLINE_S)
        socket.told.put(Call(1, 1, 7, "ping", b""))
        sent: list[Any] = [socket.sent.get(timeout=DEADLINE_S) for _ in range(2)]
        assert type(hello).__name__ == "HelloWorker"
        assert sent[0] is done
        assert isinstance(sent[1], CallResult)
    finally:
        socket.parked = True
        os.close(read_end)
        os.close(write_end)
