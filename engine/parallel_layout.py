"""From the sizes that a user asked for to the layout that this model can have with them."""

from __future__ import annotations

from drumline.engine.core.balance.plan import POLICIES
from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import attention_replicas, check_model, uneven_tensor_parallel

_MAX_PORT = 65535


def parallel_layout(parallel: ParallelConfig, spec: ModelSpec) -> Layout:
    """The layout of ``parallel`` for ``spec``. Raises InvalidConfig (field, found, valid) when the model cannot be cut
    so, naming the user's own field."""
    tp, kv_heads = parallel.tensor_parallel_size, spec.num_kv_heads
    attn_dp = attention_replicas(tp, kv_heads) if parallel.enable_dp_attention else 1
    layout = Layout(
        data_parallel_size=parallel.data_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        tensor_parallel_size=tp,
        enable_expert_parallel=parallel.enable_expert_parallel,
        attention_data_parallel_size=1 if tp % attn_dp else attn_dp,
        pipeline_partition=parallel.pipeline_partition or (),
    )
    if tp % attn_dp:
        why = f"with enable_dp_attention and {kv_heads} KV heads {tp} ranks would be cut into {attn_dp} equal parts"
        raise uneven_tensor_parallel(layout, spec, True, why)
    check_model(layout, spec, dp_attention=parallel.enable_dp_attention)
    _check_ports(parallel, len(layout.lockstep_groups(spec.is_moe)))
    _check_redundant(parallel, layout, spec)
    return layout


def balances(parallel: ParallelConfig, layout: Layout) -> bool:
    """Whether there is a balance of experts to keep: one rank with all of them has none."""
    return parallel.enable_eplb and layout.ep_size > 1


def _check_redundant(parallel: ParallelConfig, layout: Layout, spec: ModelSpec) -> None:
    redundant, most = parallel.eplb_config.num_redundant_experts, spec.num_experts * (layout.ep_size - 1)
    if redundant > most:
        valid = f"0 to {most}: {spec.num_experts} experts have at most one copy on each of {layout.ep_size} ranks"
        raise InvalidConfig("num_redundant_experts", redundant, valid)
    policy, more = parallel.eplb_config.policy, -(spec.num_experts + redundant) % layout.ep_size
    if policy != POLICIES[0] and balances(parallel, layout) and more:
        valid = (
            f"{redundant + more} while policy is {policy}, which needs as many slots on all {layout.ep_size} ranks; "
            f"{POLICIES[0]} takes any number"
        )
        raise InvalidConfig("num_redundant_experts", redundant, valid)


def _check_ports(parallel: ParallelConfig, groups: int) -> None:
    """Each lockstep group has a store of its own, at a port of its own."""
    first, rpc = parallel.data_parallel_master_port, parallel.data_parallel_rpc_port
    if not first:
        return
    last = first + groups - 1
    if last > _MAX_PORT:
        valid = f"0, or at most {_MAX_PORT - groups + 1}: {groups} lockstep groups take a port each, from this one on"
        raise InvalidConfig("data_parallel_master_port", first, valid)
    if first <= rpc <= last:
        valid = f"0, or a port outside of {first} to {last}, the stores of {groups} lockstep groups"
        raise InvalidConfig("data_parallel_rpc_port", rpc, valid)


def layout_warnings(parallel: ParallelConfig, layout: Layout, spec: ModelSpec) -> tuple[str, ...]:
    """What was asked for and changes nothing here."""
    texts = []
    if parallel.enable_eplb and not balances(parallel, layout):
        texts.append("enable_eplb changes nothing: one rank holds all experts of a layer")
    if parallel.enable_dp_attention and layout.attention_data_parallel_size == 1:
        text = (
            f"enable_dp_attention changes nothing: tensor_parallel_size ({layout.tensor_parallel_size}) is less than "
            f"twice the KV heads ({spec.num_kv_heads})"
        )
        texts.append(text)
    return tuple(texts)
