"""What membership and the balance of experts must know, from what the user decided and what the model folder says."""

from __future__ import annotations

from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.members import MembershipConfig
from drumline.engine.launch.external import ExternalLaunch
from drumline.engine.launch.order import Order
from drumline.engine.parallel_layout import balances
from drumline.engine.resolve import ResolvedConfig
from drumline.protocol.shards import layer_split
from drumline.protocol.weights import DTYPE_BYTES


def membership_config(
    order: Order, resolved: ResolvedConfig, term: int, launch: ExternalLaunch | None, launch_token: str
) -> MembershipConfig:
    """The membership of one engine. ``launch`` says which ranks somebody else starts, with ``launch_token``."""
    faults, parallel, layout = resolved.config.faults, resolved.config.parallel, resolved.layout
    return MembershipConfig(
        term=term,
        groups=resolved.groups,
        worker=resolved.worker,
        digest=resolved.digest,
        supervisor_token=order.supervisor_token,
        placements=resolved.placements,
        store_host=parallel.data_parallel_master_ip,
        store_port=parallel.data_parallel_master_port,
        start_deadline_s=faults.start_deadline_s,
        external_ranks=frozenset(launch.ranks if launch is not None else ()),
        launch_token=launch_token,
        layout=layout,
        lockstep=resolved.spec.is_moe,
        num_experts=resolved.spec.num_experts,
        moe_layer_stage=_stages(resolved),
        expert_slot_bytes=_slot_bytes(resolved),
        expert_growth_bytes=faults.expert_growth_bytes,
        restart_limit=faults.restart_limit,
        expert_placement_strategy=parallel.expert_placement_strategy,
    )


def balance_config(resolved: ResolvedConfig) -> BalanceConfig | None:
    """The balance of experts of one engine, None where experts stay where they are."""
    parallel, moe = resolved.config.parallel, resolved.spec.moe
    if moe is None or not balances(parallel, resolved.layout):
        return None
    eplb = parallel.eplb_config
    return BalanceConfig(
        policy=eplb.policy,
        window_size=eplb.window_size,
        step_interval=eplb.step_interval,
        load_interval=eplb.load_interval,
        bytes_per_step=eplb.bytes_per_step,
        max_moved=float(eplb.max_moved),
        min_gain=float(eplb.min_gain),
        log_balancedness=eplb.log_balancedness,
        num_groups=moe.num_groups,
        expert_bytes=_expert_bytes(resolved),
    )


def _expert_bytes(resolved: ResolvedConfig) -> int:
    """Of one expert in one layer: three matrices of hidden x intermediate."""
    moe, spec = resolved.spec.moe, resolved.spec
    if moe is None:
        return 0
    return 3 * spec.hidden_size * moe.moe_intermediate_size * DTYPE_BYTES[resolved.worker.dtype]


def _stages(resolved: ResolvedConfig) -> tuple[int, ...]:
    """The pipeline stage of each MoE layer."""
    layout, spec = resolved.layout, resolved.spec
    spans = layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    return tuple(
        next(stage for stage, (first, end) in enumerate(spans) if first <= layer < end) for layer in spec.moe_layers
    )


def _slot_bytes(resolved: ResolvedConfig) -> tuple[int, ...]:
    """Bytes of one expert slot in all layers of each stage, and of the staging buffer that comes with it."""
    one, of_layer = _expert_bytes(resolved), _stages(resolved)
    counts = [of_layer.count(stage) for stage in range(resolved.layout.pipeline_parallel_size)]
    staging = balances(resolved.config.parallel, resolved.layout)
    return tuple(one * (count + staging) if count else 0 for count in counts)
