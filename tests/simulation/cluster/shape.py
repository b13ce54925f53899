"""What is simulated: the sizes of an engine and how fast and how reliable its parts are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.coordination_config import CoordinationConfig
from drumline.engine.core.members import MembershipConfig
from drumline.protocol.layout import Layout
from drumline.protocol.messages import WorkerConfig
from drumline.protocol.placement import initial_placement

DIGEST = "digest"
SUPERVISOR_TOKEN = "supervisor-token"
SLOT_BYTES = 1000
RESUME_WINDOW_S = 60.0


@dataclass(slots=True, kw_only=True)
class Shape:
    """Times are mean virtual seconds. ``num_experts`` 0: a dense model, whose engine replicas do not meet.

    ``growth_bytes``: how much memory each rank may take for experts of lost ranks, ``None``: as the engine chooses.
    ``redundant``: expert slots of a layer beyond one of each. ``balance``: how experts move, None: not at all;
    ``transfer_s``: how long a part of one takes, ``plan_s``: how long a plan, ``plan_trouble``: the chance that none
    comes of it, or late; ``real_plans``: they are those of the policy, else anything that can be. ``silent_deaths``:
    the chance that nobody tells of a process that ended. ``kill_s``: how long a kill takes.
    """

    layout: Layout
    core: CoreConfig
    num_blocks: int
    num_experts: int
    moe_layer_stage: tuple[int, ...]
    growth_bytes: int | None = None
    free_bytes: int = 1 << 20
    restart_limit: int = 5
    start_deadline_s: float = 120.0
    step_s: float = 0.02
    delay_s: float = 0.002
    load_s: float = 1.0
    commit_s: float = 0.005
    beat_s: float = 2.0
    kill_s: float = 0.02
    silent_deaths: float = 0.0
    through_codec: bool = False
    keeps_journal: bool = True
    redundant: int = 0
    balance: BalanceConfig | None = None
    transfer_s: float = 0.01
    plan_s: float = 0.1
    plan_trouble: float = 0.0
    real_plans: bool = False

    @property
    def lockstep(self) -> bool:
        """Whether all engine replicas form one lockstep group."""
        return self.num_experts > 0

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each lockstep group."""
        return tuple(
            tuple(rank for dp_rank in dp_ranks for rank in self.layout.replica_ranks(dp_rank))
            for dp_ranks in self.layout.lockstep_groups(self.lockstep)
        )

    def worker(self) -> WorkerConfig:
        """The configuration that ranks are welcomed with."""
        core, layout = self.core, self.layout
        return WorkerConfig(
            model="simulated",
            dtype="float32",
            max_model_len=core.max_model_len,
            max_num_seqs=core.max_num_seqs,
            max_num_batched_tokens=core.max_num_batched_tokens,
            block_size=core.block_size,
            num_blocks=self.num_blocks,
            kv_cache_memory_bytes=0,
            gpu_memory_utilization=0.9,
            data_parallel_size=layout.data_parallel_size,
            tensor_parallel_size=layout.tensor_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            enable_expert_parallel=layout.enable_expert_parallel,
            attention_data_parallel_size=layout.attention_data_parallel_size,
            coordinator_lease_s=60.0,
            enable_eplb=self.balance is not None,
            load_interval=self.balance.load_interval if self.balance is not None else 0,
        )

    def coordination(self, term: int, seed: int) -> CoordinationConfig:
        """What the coordinator of ``term`` is made with."""
        placements = {}
        if self.num_experts:
            first = initial_placement(len(self.moe_layer_stage), self.num_experts, self.layout.ep_size)
            first = np.hstack([first, first[:, : self.redundant]])
            placements = dict.fromkeys(range(len(self.groups)), first)
        stages = range(self.layout.pipeline_parallel_size)
        membership = MembershipConfig(
            term=term,
            groups=self.groups,
            worker=self.worker(),
            digest=DIGEST,
            supervisor_token=SUPERVISOR_TOKEN,
            placements=placements,
            start_deadline_s=self.start_deadline_s,
            layout=self.layout,
            lockstep=self.lockstep,
            num_experts=self.num_experts,
            moe_layer_stage=self.moe_layer_stage,
            expert_slot_bytes=tuple(SLOT_BYTES * self.moe_layer_stage.count(stage) for stage in stages),
            expert_growth_bytes=self.growth_bytes,
            restart_limit=self.restart_limit,
        )
        return CoordinationConfig(
            membership=membership,
            core=self.core,
            layout=self.layout,
            seed=seed,
            hash_key=seed,
            balance=self.balance,
        )
