"""What a balancer has to do next, is having done, and is doing; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.shuffle import ShuffleRun
from drumline.engine.core.balance.window import F64
from drumline.protocol.messages import NO_NUMBERS, I32Matrix

GIVEN = "given"
"""What reports call the policy of a placement that somebody gave."""


@dataclass(frozen=True, slots=True)
class Late:
    """``ranks`` have not done what ``text`` says in time."""

    ranks: tuple[int, ...]
    text: str


@dataclass(slots=True, eq=False)
class Following:
    """What is to be planned when the present run is over."""

    target: I32Matrix
    callers: list[int]


@dataclass(slots=True, eq=False)
class Asked:
    """A plan that is being made since ``since``. ``policy``: given, where it is a placement that somebody has.
    ``callers``: who asked for it."""

    number: int
    policy: str
    callers: list[int]
    since: float


@dataclass(slots=True, eq=False)
class Run:
    """A plan that is carried out, ``asked`` for so, from the placement ``before``."""

    shuffle: ShuffleRun
    plan: PlacementPlan
    before: I32Matrix
    asked: Asked


def plan_request(
    config: BalanceConfig,
    number: int,
    tokens: F64,
    placement: I32Matrix,
    places: ExpertPlaces,
    target: I32Matrix,
) -> PlanRequest:
    """What a policy is asked. ``tokens``: float64 (snapshots, layers, experts)."""
    return PlanRequest(
        number=number,
        policy=config.policy,
        num_layers=tokens.shape[1],
        load=tokens.reshape(-1, tokens.shape[2]).astype(np.float32),
        placement=placement,
        slots=places.slots,
        nodes=places.nodes,
        dead=NO_NUMBERS,
        num_groups=config.num_groups,
        expert_bytes=config.expert_bytes,
        max_moved=config.max_moved,
        min_gain=config.min_gain,
        target=target,
    )
