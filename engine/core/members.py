"""The members of an engine as data: ranks, groups, and what membership must know of the engine.

What membership has to say is in :mod:`~drumline.engine.core.decisions`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from drumline.engine.core.decisions import (
    Called,
    Ended,
    EpochReady,
    FaultSeen,
    GroupClosed,
    JoinDue,
    Leased,
    Loading,
    Output,
    Ready,
    Tell,
    ToOwner,
    ToPeer,
    ToReplica,
)
from drumline.engine.core.refit import Refit
from drumline.engine.core.restarts import Restarts
from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32, Left, Loaded, WorkerConfig

__all__ = [
    "Called",
    "Ended",
    "EpochReady",
    "FaultSeen",
    "GroupClosed",
    "GroupRecord",
    "GroupStage",
    "JoinDue",
    "Leased",
    "Loading",
    "MembershipConfig",
    "Output",
    "RankRecord",
    "RankState",
    "Ready",
    "Refusals",
    "Tell",
    "ToOwner",
    "ToPeer",
    "ToReplica",
]


class RankState(enum.StrEnum):
    """STARTING: until it has loaded. PARKED: loaded, but it computes in no epoch. READY: it has met the others of its
    epoch. WEDGED: lost because it missed a deadline; its process may live on. DEAD: its process or its connection is
    gone."""

    STARTING = "starting"
    PARKED = "parked"
    READY = "ready"
    WEDGED = "wedged"
    DEAD = "dead"


class GroupStage(enum.IntEnum):
    """How far the epoch of a lockstep group has come. GATHERING: no epoch, there are too few ranks for one. DRAINING:
    open, but another engine replica has come; the next epoch begins when no step is in flight."""

    GATHERING = 0
    LEAVING = 1
    OPENING_STORE = 2
    FORMING = 3
    OPEN = 4
    DRAINING = 5


@dataclass(slots=True)
class RankRecord:
    """What is known of one rank. ``replied`` is the last step that it replied to; ``step``, ``collective`` and
    ``inside`` are the progress of its last beat.

    ``has_weights``: this process has loaded. ``epoch``: the last one that it is known to have come to, 0 before one.
    ``computed``: the incarnation that last computed in an open epoch. ``executed``: steps that this process has replied
    to; ``raised_at``: that number at its last exception, -1 without one; ``faulted``: the epoch of its last fault, -2
    without one; ``missed_at``: when others last missed it though it was there, which they did ``missed`` times in a
    row. ``num_blocks``: KV blocks of the rank, whichever process it is. ``start_at``: when a process is to be started,
    None when none is due. ``unconfirmed``: processes ordered of which the supervisor has told nothing. ``lost_pids``:
    former processes.
    """

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
    leased: bool = False
    loaded: Loaded | None = None
    has_weights: bool = False
    left: Left | None = None
    epoch: int = 0
    computed: str = ""
    executed: int = 0
    raised_at: int = -1
    faulted: int = -2
    missed: int = 0
    missed_at: int = 0
    num_blocks: int = 0
    start_at: float | None = None
    crash_looping: bool = False
    unconfirmed: int = 0
    lost_pids: set[int] = field(default_factory=set)
    log: Restarts = field(default_factory=lambda: Restarts(0))
    restarts: int = 0
    last_fault: str = ""

    def forget(self, now: float) -> None:
        """Another process: nothing of what the one before did is its own."""
        self.load_done = self.load_total = 0
        self.executed = self.missed = self.missed_at = 0
        self.raised_at = -1
        self.faulted = -2
        self.epoch = 0
        self.replied = -1
        self.step = self.collective = 0
        self.inside = False
        self.progress_at = now

    @property
    def has_computed(self) -> bool:
        """Whether this process has computed in an open epoch."""
        return bool(self.computed) and self.computed == self.incarnation

    @property
    def lost(self) -> bool:
        """Whether there is no process that may be used."""
        return self.state in (RankState.DEAD, RankState.WEDGED)

    @property
    def coming(self) -> bool:
        """Whether it cannot be used yet, but may be soon."""
        return not self.usable and not self.crash_looping

    @property
    def usable(self) -> bool:
        """Whether it lives and has loaded, so that an epoch can be formed with it."""
        return self.has_weights and not self.lost


@dataclass(slots=True)
class GroupRecord:
    """A lockstep group and the epoch that it forms or has formed. Epochs count from 1.

    ``waiting``: ranks whose answer the stage waits for, since ``since``, at most ``limit_s``. ``members`` compute in
    the epoch, ``parked`` ones belong to it. ``served``: the dp ranks (counted within the group) of the last open epoch.
    ``opened``: whether there was one. ``fault_at``: the first fault since then, None without one. ``stood_at``: when
    steps ceased. ``tried``: the processes
    that an epoch could not be formed with. ``waiting_for``: why it cannot, for the status.
    """

    id: int
    ranks: tuple[int, ...]
    epoch: int = 0
    stage: GroupStage = GroupStage.GATHERING
    waiting: set[int] = field(default_factory=set)
    since: float = 0.0
    limit_s: float = 0.0
    members: tuple[int, ...] = ()
    parked: tuple[int, ...] = ()
    served: tuple[int, ...] = ()
    refit: Refit | None = None
    opened: bool = False
    fault_at: float | None = None
    stood_at: float = 0.0
    tried: frozenset[str] = frozenset()
    waiting_for: str = ""

    @property
    def is_open(self) -> bool:
        """Whether steps run."""
        return self.stage in (GroupStage.OPEN, GroupStage.DRAINING)


@dataclass(slots=True)
class Refusals:
    """Messages that were dropped, by reason. ``fenced``: of processes whose place is taken."""

    wrong_token: int = 0
    duplicate_hello: int = 0
    unknown_peer: int = 0
    foreign_rank: int = 0
    stale: int = 0
    out_of_order: int = 0
    fenced: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by field name, as the status shows them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """``groups``: the ranks of each lockstep group. ``placements``: expert slots of a group, int32 (moe_layers, slots),
    for groups that have any. ``start_deadline_s``: longest time without progress during a start. ``external_ranks`` are
    started by somebody else and show ``launch_token``. ``store_port``: port of the first group's store, each next group
    takes the next port; 0: any free ones. ``lockstep``: whether all dp ranks are one group. ``moe_layer_stage``: the
    pipeline stage of each MoE layer. ``expert_slot_bytes``: by stage, bytes of one slot over its layers.
    ``expert_growth_bytes``: how much more a rank may take for experts of lost ranks; None: on CUDA 0, on CPU what it
    needs for all of them within half of the free memory. ``restart_limit``: starts of a rank within 10 minutes."""

    term: int
    groups: Sequence[Sequence[int]]
    worker: WorkerConfig
    digest: str
    supervisor_token: str
    layout: Layout
    lockstep: bool = True
    placements: Mapping[int, I32] = field(default_factory=dict)
    store_host: str = "127.0.0.1"
    start_deadline_s: float = 120.0
    external_ranks: frozenset[int] = frozenset()
    launch_token: str = ""
    store_port: int = 0
    num_experts: int = 0
    moe_layer_stage: tuple[int, ...] = ()
    expert_slot_bytes: tuple[int, ...] = ()
    expert_growth_bytes: int | None = None
    restart_limit: int = 5
    expert_placement_strategy: str = "linear"
