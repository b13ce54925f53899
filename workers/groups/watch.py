"""What every wait of a group looks at, and the errors that end one.

A wait is cut into slices, because a blocked one cannot be interrupted: between two slices the main thread looks at the
abort flag and may walk away. Slices are counted, not clocked: time in which this process was itself stopped must not
count against a peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from drumline.protocol.errors import DrumlineError, ErrorInfo
from drumline.workers.abort import AbortFlag, EpochAborted
from drumline.workers.groups.place import GroupPlace
from drumline.workers.progress import Progress

SLICE_S = 0.05
COLLECTIVE_DEADLINE_S = 120.0
FORM_DEADLINE_S = 60.0


class PeerLost(DrumlineError):
    """A collective failed: the connection to another rank broke. The coordinator knows which process is to blame."""

    kind = "peer_lost"
    retryable = True


class GroupTimeout(DrumlineError):
    """A collective, or the forming of a group, did not end within its deadline."""

    kind = "group_timeout"
    retryable = True


class Watch:
    """The watch over one group's waits. As a context it is one collective: entered, and left or failed.

    ``failed`` says that a collective ended badly, ``closed`` that the group has been given up.
    """

    def __init__(self, name: str, place: GroupPlace, abort: AbortFlag, progress: Progress, deadline_s: float) -> None:
        self.name = name
        self.place = place
        self.deadline_s = deadline_s
        self.failed = False
        self.closed = False
        self._abort = abort
        self._progress = progress
        self._position = place.position

    def __enter__(self) -> None:
        self.check()
        self._progress.enter_collective()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.leave_collective()
        if error is not None:
            self.failed = True

    def check(self) -> None:
        """Raises EpochAborted when the epoch is over or the group is closed."""
        self._abort.check(self.place.term, self.place.epoch)
        if self.closed:
            raise EpochAborted(f"group {self.name} of epoch {self.place.epoch} is closed")

    def check_deadline(self, waited_s: float, missing: Sequence[int]) -> None:
        """Raises GroupTimeout when a wait for the positions ``missing`` has lasted for the group's deadline."""
        if waited_s >= self.deadline_s:
            raise self.error(GroupTimeout, f"it did not end within {self.deadline_s:g} s", missing)

    def error(self, kind: type[DrumlineError], text: str, missing: Sequence[int] = ()) -> DrumlineError:
        """An error of the collective that this rank is in, which waits for the ranks at the positions ``missing``.

        The group has ``failed`` from here on.
        """
        self.failed = True
        place = self.place
        step, collective = self._progress.position[2:4]
        awaited = ", ".join(str(place.members[position]) for position in missing)
        if awaited:
            text = f"waited for {'rank' if len(missing) == 1 else 'ranks'} {awaited}: {text}"
        where = f"group {self.name}, rank {place.rank} (position {self._position} of {place.size})"
        text = f"{where}, collective {collective} of step {step}: {text}"
        info = ErrorInfo(kind=kind.kind, text=text, retryable=True, epoch=place.epoch, step=step)
        return kind(text, info)

    def others(self) -> list[int]:
        """The positions of all other ranks."""
        return [position for position in range(self.place.size) if position != self._position]
