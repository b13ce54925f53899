"""The least that a balancer can be given: settings, and a model that has experts and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from drumline.protocol.messages import I32Matrix
from tests.unit.workers.shuffles import rank_weights


@dataclass(frozen=True)
class Settings:
    num_redundant_experts: int
    window_size: int = 3
    step_interval: int = 8


@dataclass(frozen=True)
class Parallel:
    eplb_config: Settings


@dataclass
class Model:
    """Experts without a model around them; ``held``: int32 (layers, slots), of this rank."""

    held: I32Matrix
    num_physical_experts: int
    num_logical_experts: int
    num_expert_groups: int = 1
    num_shared_experts: int = 0
    state: tuple[Tensor, Tensor, Tensor] = field(init=False)
    expert_weights: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.expert_weights = rank_weights(self.held)
        self.num_moe_layers, self.num_local_physical_experts = self.held.shape
        self.num_routed_experts = self.num_logical_experts
        self.num_redundant_experts = self.num_physical_experts - self.num_logical_experts

    def set_eplb_state(
        self, expert_load_view: Tensor, logical_to_physical_map: Tensor, logical_replica_count: Tensor
    ) -> None:
        self.state = (expert_load_view, logical_to_physical_map, logical_replica_count)

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        raise AssertionError("no rank came or went")
