"""What a slot that a rank grows by costs it."""

from __future__ import annotations

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.launch.order import Order
from drumline.engine.membership_config import balance_config, membership_config
from drumline.engine.resolve import resolve


def test_a_slot_costs_its_staging_buffer_too_where_experts_move() -> None:
    costs = {}
    for enable_eplb in (False, True):
        parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, enable_eplb=enable_eplb)
        config = EngineConfig("demo", parallel=parallel)
        resolved = resolve(config)
        order = Order(config, "", "", "", "", 0)
        (costs[enable_eplb],) = membership_config(order, resolved, 1, None, "").expert_slot_bytes
        balance = balance_config(resolved)
    assert balance is not None
    assert (costs[False], costs[True]) == (4 * balance.expert_bytes, 5 * balance.expert_bytes)
