"""What an injected fault came to, and the error when it came to nothing."""

from __future__ import annotations

import msgspec

from drumline.protocol.errors import DrumlineError


class InjectionFailed(DrumlineError, AssertionError):
    """An injected fault was not seen to happen: its rank does not exist, its point was never reached, the process
    lives on. The text says which. An AssertionError too, so that a test fails by it and not by an error."""

    kind = "injection_failed"


class InjectedFault(msgspec.Struct, frozen=True):
    """A fault that was seen to happen.

    ``kind``: kill, stop, exit, segv, raise, nan, hang, slow; drop, delay, duplicate, corrupt, partition; coordinator,
    stopped_coordinator, forkserver, planner, full_disk. ``rank`` is -1 where there is none, ``pid`` 0 where none is
    known. ``point`` and ``step``: where it was to happen. ``at``: in the seconds of ``time.monotonic()``. ``evidence``:
    by what it was seen.
    """

    kind: str
    rank: int = -1
    pid: int = 0
    point: str = "now"
    step: int = -1
    at: float = 0.0
    evidence: str = ""
