"""What ``AsyncEngine.status()`` returns and ``GET /status`` shows: the state of the whole engine at one moment.

The structs are keyed (JSON objects), because people and scripts read them. Fields are only added, with defaults.
"""

from __future__ import annotations

import msgspec


class Shown(msgspec.Struct, frozen=True, gc=False):
    """A part of the status."""


class SupervisorStatus(Shown, frozen=True, gc=False):
    """``pid`` is 0 until the supervisor has said hello."""

    pid: int


class CoordinatorStatus(Shown, frozen=True, gc=False):
    """``incarnation`` is drawn when the coordinator starts."""

    pid: int
    incarnation: str


class GroupStatus(Shown, frozen=True, gc=False):
    """A lockstep group. ``replicas`` are the dp ranks of its engine replicas; ``wave_state`` is "running" or "paused";
    ``step`` is the number of the newest step planned in this epoch; ``dummy_steps`` counts plans without tokens sent to
    single attention replicas."""

    id: int
    replicas: tuple[int, ...]
    epoch: int
    wave: int
    wave_state: str
    step: int
    dummy_steps: int


class ReplicaStatus(Shown, frozen=True, gc=False):
    """An attention replica: its sequences (rows running, sequences waiting) and its KV blocks, as many as the rank with
    fewest has. ``blocks_cached`` counts free blocks that still hold a cached prefix."""

    dp_rank: int
    attn_rank: int
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int


class RankStatus(Shown, frozen=True, gc=False):
    """One worker process. ``state``: starting, parked (loaded, but its engine replica lacks another rank), ready,
    wedged or dead. ``step_age_s``: how long it has had for its oldest step
    in flight, 0.0 without one. ``last_fault`` is the text of the last error it reported or died of. ``kv_blocks``: how
    many it has room for, ``weight_bytes``: what it has loaded, both 0 until it is ready."""

    rank: int
    dp_rank: int
    pp_rank: int
    tp_rank: int
    ep_rank: int
    pid: int
    incarnation: str
    host: str
    state: str
    step: int
    step_age_s: float
    restarts: int
    last_fault: str
    kv_blocks: int = 0
    weight_bytes: int = 0


class RequestCounts(Shown, frozen=True, gc=False):
    """Requests since the start of the term."""

    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class FaultStatus(Shown, frozen=True, gc=False):
    """A fault of a rank. ``kind``: exit, wedged, unreachable, exception, numeric, peer_lost or protocol; ``evidence``
    says how it is known. ``at`` is in seconds since 1970; ``recovered_s``: how long the group stood still, -1.0 while
    it still does."""

    rank: int
    incarnation: str
    group: int
    epoch: int
    step: int
    kind: str
    evidence: str
    at: float
    recovered_s: float = -1.0


class LayerBalance(Shown, frozen=True, gc=False):
    """One MoE layer over the window: tokens of the mean and of the busiest rank, per step, and the first over the
    second. ``generation``: how often it got other experts in this term."""

    avg_tokens: float
    max_tokens: float
    balancedness: float
    generation: int = 0


class EplbStatus(Shown, frozen=True, gc=False):
    """The balance of experts. ``state``: idle, planning or moving. ``avg_tokens`` and ``max_tokens``: expert tokens per
    step of the mean and the busiest rank, each a sum over layers; ``balancedness``: the mean of those of the
    ``layers``, 1.0 while nothing was counted. ``window_steps``: steps that they cover. ``single_copy``: experts, over
    all layers, with one live copy. ``plans``, ``slots_moved``, ``bytes_moved``: since the start of the term.
    ``layers_left``: of the plan that is carried out. ``last_plan``: what became of the last one, and why."""

    policy: str
    state: str
    balancedness: float = 1.0
    avg_tokens: float = 0.0
    max_tokens: float = 0.0
    window_steps: int = 0
    layers: tuple[LayerBalance, ...] = ()
    single_copy: int = 0
    plans: int = 0
    slots_moved: int = 0
    bytes_moved: int = 0
    layers_left: int = 0
    last_plan: str = ""


class EngineStatus(Shown, frozen=True, gc=False):
    """``state``: starting, ready, recovering (no replica serves, requests wait), closing or failed. ``counters`` holds
    every count by name: scheduling (steps, preemptions, ...), sockets (``client_frames_malformed``, ...), stale or
    foreign messages, faults by kind. ``journal``: on, off or degraded. ``kv_blocks``: of the replica with fewest, which
    bounds what every request may need; 0 until it is ready. ``faults``: the last 64, oldest first. ``waiting_for``:
    what requests wait for while none is served. ``eplb``: None unless experts are balanced."""

    state: str
    term: int
    supervisor: SupervisorStatus
    coordinator: CoordinatorStatus
    groups: tuple[GroupStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    ranks: tuple[RankStatus, ...]
    requests: RequestCounts
    counters: dict[str, int]
    journal: str
    kv_blocks: int = 0
    faults: tuple[FaultStatus, ...] = ()
    waiting_for: str = ""
    eplb: EplbStatus | None = None
