"""What membership and coordination decide: messages to send, and things to tell, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from drumline.engine.core.balance.plan import PlanRequest
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import CallResult, Event, RebalanceReport, Step, ToSupervisor, ToWorker


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send ``message`` to ``rank`` (-1: to who is none) at the socket identity ``peer``."""

    rank: int
    peer: bytes
    message: ToWorker


@dataclass(frozen=True, slots=True)
class ToReplica:
    """Send ``step`` to the ranks of one attention replica."""

    ranks: tuple[int, ...]
    step: Step


@dataclass(frozen=True, slots=True)
class ToOwner:
    """Send ``message`` to the supervisor at the socket identity ``peer``."""

    peer: bytes
    message: ToSupervisor


@dataclass(frozen=True, slots=True)
class Loading:
    """``rank`` has read ``done`` of ``total`` bytes of weights."""

    rank: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class GroupClosed:
    """A fault has ended ``epoch`` of ``group``, which was open or forming. ``lost``: those of the dp ranks that served
    last (counted within the group) that are no longer whole, so that their KV is gone."""

    group: int
    epoch: int
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EpochReady:
    """Every rank of ``group`` is ready. ``num_blocks``: KV blocks by global rank, of those that compute. ``serving``:
    the dp ranks (counted within the group) that compute; those ``kept`` have the KV that they had."""

    group: int
    epoch: int
    num_blocks: Mapping[int, int]
    serving: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JoinDue:
    """Another engine replica of ``group`` is there: plan no more steps, and say when none is in flight."""

    group: int


@dataclass(frozen=True, slots=True)
class Leased:
    """``rank`` asks for ``seconds`` from now on for the step that it is in, ``step`` at most; 0.0: no longer."""

    rank: int
    group: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FaultSeen:
    """A fault of a rank. ``kind``: exit, wedged, unreachable, exception, numeric, peer_lost or protocol. ``evidence``:
    how it is known. ``inside``: what the rank computed may have caused it. ``rows``: of the batch table, those whose
    numbers are not finite. ``epoch``: the one that the rank was in."""

    rank: int
    incarnation: str
    group: int
    epoch: int
    step: int
    kind: str
    evidence: str
    inside: bool
    rows: tuple[int, ...]
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell every client."""

    event: Event


@dataclass(frozen=True, slots=True)
class Log:
    """Write ``text`` to the log."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class PlanWanted:
    """Have a placement of experts planned, elsewhere, and bring the answer."""

    request: PlanRequest


@dataclass(frozen=True, slots=True, eq=False)
class Rebalanced:
    """What became of a plan for the experts. ``callers``: who asked for it, nobody for one that was due."""

    callers: tuple[int, ...]
    report: RebalanceReport


@dataclass(frozen=True, slots=True)
class Called:
    """A rank has answered a control call."""

    message: CallResult


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is ready for the first time."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine cannot go on (``error``), or is closed by its supervisor."""

    reason: str
    error: ErrorInfo | None = None


Output = (
    ToPeer
    | ToReplica
    | ToOwner
    | Loading
    | GroupClosed
    | EpochReady
    | JoinDue
    | Leased
    | FaultSeen
    | Tell
    | Log
    | PlanWanted
    | Rebalanced
    | Called
    | Ready
    | Ended
)
