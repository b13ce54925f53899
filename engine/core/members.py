"""The members of an engine as data: ranks, groups, and what membership has to say to whom."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from drumline.engine.core.evidence import Loss
from drumline.protocol.messages import I32, Ready, ToSupervisor, ToWorker, WorkerConfig


class RankState(enum.StrEnum):
    """READY: it has loaded and met the others of its epoch. DEAD: it is lost."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class GroupStage(enum.IntEnum):
    """How far the epoch of a lockstep group has come."""

    GATHERING = 0
    OPENING_STORE = 1
    FORMING = 2
    OPEN = 3


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send ``message`` to ``rank`` at the socket identity ``peer``."""

    rank: int
    peer: bytes
    message: ToWorker


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
class EpochReady:
    """Every rank of ``group`` is ready. ``num_blocks``: KV blocks by position of the rank in the group."""

    group: int
    epoch: int
    num_blocks: tuple[int, ...]


Output = ToPeer | ToOwner | Loading | EpochReady | Loss


@dataclass(slots=True)
class RankRecord:
    """What is known of one rank. ``replied`` is the last step that it replied to; ``step``, ``collective`` and
    ``inside`` are the progress of its last beat."""

    rank: int
    group: int
    token: str = ""
    state: RankState = RankState.STARTING
    peer: bytes | None = None
    incarnation: str = ""
    pid: int = 0
    host: str = ""
    heard_at: float = 0.0
    progress_at: float = 0.0
    load_done: int = 0
    load_total: int = 0
    replied: int = -1
    step: int = 0
    collective: int = 0
    inside: bool = False
    ready: Ready | None = None
    restarts: int = 0
    last_fault: str = ""


@dataclass(slots=True)
class GroupRecord:
    """A lockstep group and the epoch that it forms or has formed. Epochs count from 1."""

    id: int
    ranks: tuple[int, ...]
    epoch: int = 0
    stage: GroupStage = GroupStage.GATHERING


@dataclass(slots=True)
class Refusals:
    """Messages that were dropped, by reason."""

    wrong_token: int = 0
    duplicate_hello: int = 0
    unknown_peer: int = 0
    foreign_rank: int = 0
    stale: int = 0
    out_of_order: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by field name, as the status shows them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """``groups``: the ranks of each lockstep group. ``placements``: expert slots of a group, int32 (moe_layers, slots),
    for groups that have any. ``start_deadline_s``: longest time without progress during a start. ``external_ranks`` are
    started by somebody else and show ``launch_token``. ``store_port``: port of the first group's store, each next group
    takes the next port; 0: any free ones."""

    term: int
    groups: Sequence[Sequence[int]]
    worker: WorkerConfig
    digest: str
    supervisor_token: str
    placements: Mapping[int, I32] = field(default_factory=dict)
    store_host: str = "127.0.0.1"
    start_deadline_s: float = 120.0
    external_ranks: frozenset[int] = frozenset()
    launch_token: str = ""
    store_port: int = 0
