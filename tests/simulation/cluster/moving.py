"""Days on which experts move while everything else happens that can, all from one seed."""

from __future__ import annotations

import random

from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.balance.plan import POLICIES
from drumline.protocol.layout import Layout
from tests.simulation.cluster.faults import MOVING_POINTS, RankFault
from tests.simulation.cluster.schedule import (
    MESSAGES_FROM_RANK,
    MESSAGES_TO_RANK,
    START_S,
    OtherFault,
    Schedule,
    make_message_fault,
    make_other_faults,
    make_rank_fault,
    make_shape,
    make_wanted,
)
from tests.simulation.cluster.shape import Shape

LAYOUTS = (
    Layout(2, enable_expert_parallel=True),
    Layout(3, enable_expert_parallel=True),
    Layout(4, enable_expert_parallel=True),
    Layout(2, 1, 2, enable_expert_parallel=True),
    Layout(2, 2, 1, enable_expert_parallel=True),
)
KINDS = ("kill", "kill", "kill", "stop", "coordinator", "exit", "raise", "hang", "slow")


def make_moving_shape(rng: random.Random) -> Shape:
    """An engine with a balancer that never rests."""
    layout = rng.choice(LAYOUTS)
    shape = make_shape(rng, layout)
    if layout.pipeline_parallel_size > 1:
        shape.moe_layer_stage = rng.choice(((0, 1), (0, 0, 1), (1, 1)))
    shape.redundant = rng.choice((0, 1, 2, layout.ep_size))
    expert_bytes = rng.choice((90, 100))
    shape.balance = BalanceConfig(
        policy=rng.choice(("incremental", *POLICIES)),
        min_gain=rng.choice((0.0, 0.01)),
        max_moved=rng.choice((0.25, 1.0)),
        window_size=rng.choice((5, 40)),
        step_interval=rng.choice((2, 4, 10, 30)),
        load_interval=rng.choice((1, 3, 8)),
        bytes_per_step=rng.choice((40, 100, 250, 1000)),
        expert_bytes=expert_bytes,
        log_balancedness=rng.random() < 0.2,
        stage_deadline_s=rng.choice((5.0, 30.0)),
        plan_deadline_s=rng.choice((1.0, 5.0)),
    )
    shape.transfer_s = rng.choice((0.002, 0.02, 0.2))
    shape.real_plans = rng.random() < 0.2
    shape.plan_trouble = rng.choice((0.0, 0.1, 0.3))
    shape.plan_s = rng.choice((0.005, 0.05, 0.3))
    return shape


def make_moving_schedule(seed: int) -> Schedule:
    """One day of one engine."""
    rng = random.Random(seed)
    shape = make_moving_shape(rng)
    day = rng.choice((3.0, 6.0))
    ranks = shape.layout.num_ranks
    schedule = Schedule(seed, shape, make_wanted(rng, shape, day), generator="--experts ")
    for _ in range(rng.choice((6, 12, 18, 24))):
        kind = rng.choice(("rebalance", "given_rebalance"))
        at = START_S + rng.uniform(-1.0, day)
        schedule.other_faults.append(OtherFault(kind, at))
        if rng.random() < 0.2:
            # It is superseded at once, or in the middle.
            schedule.other_faults.append(OtherFault("given_rebalance", at + rng.choice((0.0, 0.05, 0.3))))
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        schedule.rank_faults.append(make_moving_fault(rng, ranks, day))
    for _ in range(rng.choice((0, 0, 0, 1))):
        schedule.rank_faults.append(make_rank_fault(rng, ranks, day))
    if rng.random() < 0.3:
        make_other_faults(schedule, rng, day)
    if rng.random() < 0.1:
        seconds = rng.choice((1.0, 8.0, 40.0))
        schedule.other_faults.append(
            OtherFault("stuck_link", START_S + rng.uniform(0, day), rng.randrange(ranks), seconds)
        )
    if rng.random() < 0.1:
        names = ((*MESSAGES_TO_RANK, "StageExperts", "CancelStage"), (*MESSAGES_FROM_RANK, "Staged", "Staged"))
        schedule.message_faults.append(make_message_fault(rng, ranks, day, names))
    shape.restart_limit = 60
    return schedule


def make_moving_fault(rng: random.Random, ranks: int, day: float) -> RankFault:
    """One fault of one rank while experts are on their way."""
    kind = rng.choice(KINDS)
    seconds = rng.choice((0.3, 3.0, 20.0)) if kind == "stop" else 2.0 if kind == "slow" else 0.0
    at = START_S + rng.uniform(-1.0, day)
    return RankFault(
        kind, rng.randrange(ranks), at, rng.choice(MOVING_POINTS), seconds, 20.0 if kind == "slow" else 1.0
    )
