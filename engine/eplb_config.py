"""How experts are balanced over the ranks that hold them. Names and defaults are vLLM's where it has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from drumline.engine.core.balance.plan import POLICIES
from drumline.engine.settings import (
    LARGEST_BYTES,
    Settings,
    check_boolean,
    check_number,
    check_one_of,
    check_share,
    check_text,
    check_whole,
)

MAX_REDUNDANT = 1 << 20
LEAST_BYTES_PER_STEP = 1024
_OTHER_POLICIES = {"default": "vLLM's default is hierarchical"}


class EPLBConfig(Settings, frozen=True):
    """The load of the last ``window_size`` steps is kept, as ranks report it every ``load_interval`` steps, and every
    ``step_interval`` steps ``policy`` (incremental, hierarchical or global) plans a placement from it.

    ``num_redundant_experts``: slots beyond one for each expert, in every MoE layer. A plan of incremental changes at
    most the share ``max_moved`` of the slots, and is carried out only if it gains ``min_gain`` of balancedness. No rank
    sends or receives more than ``bytes_per_step`` beside a step, but at least one part of an expert.
    ``log_balancedness``: a line in the log for every report.

    ``init_placement``: the placement to start with, or a load record to plan it from. ``record_path``: where the load
    record is written, at every plan and at the end. Both are files, see docs/configuration.md.
    """

    not_yet: ClassVar[Mapping[str, str]] = {
        "use_async": "experts always move beside the steps, and no step waits for them",
        "log_balancedness_interval": "load_interval says how often there is a report to log",
        "communicator": "experts travel over a group of their own, nccl on CUDA and gloo on CPU",
    }

    window_size: int = 1000
    step_interval: int = 3000
    num_redundant_experts: int = 0
    log_balancedness: bool = False
    policy: str = "incremental"
    bytes_per_step: int = 8 << 20
    max_moved: float = 0.25
    min_gain: float = 0.01
    load_interval: int = 32
    init_placement: str | None = None
    record_path: str | None = None

    def __post_init__(self) -> None:
        for field in ("window_size", "step_interval", "load_interval"):
            check_whole(field, getattr(self, field), 1)
        check_whole("num_redundant_experts", self.num_redundant_experts, 0, MAX_REDUNDANT)
        check_boolean("log_balancedness", self.log_balancedness)
        check_one_of("policy", self.policy, POLICIES, _OTHER_POLICIES)
        check_whole("bytes_per_step", self.bytes_per_step, LEAST_BYTES_PER_STEP, LARGEST_BYTES)
        check_number("max_moved", self.max_moved, 0.0, 1.0)
        check_share("min_gain", self.min_gain)
        for field in ("init_placement", "record_path"):
            value = getattr(self, field)
            if isinstance(value, os.PathLike):
                msgspec.structs.force_setattr(self, field, os.fsdecode(value))
            if value is not None:
                check_text(field, getattr(self, field))
