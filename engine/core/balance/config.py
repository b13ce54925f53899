"""What the balance of experts depends on."""

from __future__ import annotations

import msgspec


class BalanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``window_size``: steps that the load is kept of. ``step_interval``: steps between two plans. ``load_interval``:
    steps between two reports of a rank. ``bytes_per_step``: most that a rank sends or receives beside a step.
    ``max_moved``: share of the slots that one plan may change; ``min_gain``: balancedness that it must gain.
    ``num_groups``: expert groups of the model. ``expert_bytes``: of one expert in one layer. ``stage_deadline_s``: how
    long a rank may take from the last part of a layer on; ``plan_deadline_s``: how long a plan may take."""

    policy: str = "incremental"
    window_size: int = 1000
    step_interval: int = 3000
    load_interval: int = 32
    bytes_per_step: int = 8 << 20
    max_moved: float = 0.25
    min_gain: float = 0.01
    log_balancedness: bool = False
    num_groups: int = 1
    expert_bytes: int = 1
    stage_deadline_s: float = 30.0
    plan_deadline_s: float = 60.0
