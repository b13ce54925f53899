"""The planner's loop: a request is read, a policy solves it, the plan is written; trouble is an answer, too."""

from __future__ import annotations

import os
import time

import msgspec

from drumline.engine.core.balance.plan import PlanRequest
from drumline.engine.planner_frames import FrameReader, no_plan, pack_plan, requests
from drumline.protocol.errors import DrumlineError, ProtocolError

_READ_BYTES = 1 << 20


def serve(requests_fd: int, answers_fd: int) -> int:
    """Answer requests until their end. Returns the exit code: 0, or 2 after what is no request."""
    reader = FrameReader()
    while data := os.read(requests_fd, _READ_BYTES):
        try:
            asked = [requests.decode([frame]) for frame in reader.feed(data)]
        except ProtocolError as error:
            os.write(2, f"drumline:planner: {error.text}\n".encode())
            return 2
        for request in asked:
            _write(answers_fd, answer(request))
    return 0


def answer(request: PlanRequest) -> bytes:
    """The frame of the policy's plan, or of why there is none."""
    try:
        from drumline.engine.core.balance.policies import make_plan

        plan = make_plan(request, time.perf_counter)
        return pack_plan(msgspec.structs.replace(plan, number=request.number))
    except DrumlineError as error:
        text = error.text
    except Exception as error:
        text = f"{type(error).__name__} in policy {request.policy}: {error}"
    return pack_plan(no_plan(request, text))


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
