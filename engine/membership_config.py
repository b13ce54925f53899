"""What membership must know, from what the user decided and what the model folder says."""

from __future__ import annotations

from drumline.engine.core.members import MembershipConfig
from drumline.engine.launch.external import ExternalLaunch
from drumline.engine.launch.order import Order
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


def _stages(resolved: ResolvedConfig) -> tuple[int, ...]:
    """The pipeline stage of each MoE layer."""
    layout, spec = resolved.layout, resolved.spec
    spans = layer_split(spec.num_layers, layout.pipeline_parallel_size, layout.pipeline_partition)
    return tuple(
        next(stage for stage, (first, end) in enumerate(spans) if first <= layer < end) for layer in spec.moe_layers
    )


def _slot_bytes(resolved: ResolvedConfig) -> tuple[int, ...]:
    """Bytes of one expert slot in all layers of each stage: three matrices of hidden x intermediate per layer."""
    moe, spec = resolved.spec.moe, resolved.spec
    stages = range(resolved.layout.pipeline_parallel_size)
    if moe is None:
        return tuple(0 for _ in stages)
    one = 3 * spec.hidden_size * moe.moe_intermediate_size * DTYPE_BYTES[resolved.worker.dtype]
    of_layer = _stages(resolved)
    return tuple(one * of_layer.count(stage) for stage in stages)
