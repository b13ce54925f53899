"""The engine's side of drumline: embed it with :class:`AsyncEngine`.

Names are imported when they are first used, so that the coordinator and the supervisor, which are modules of this
package too, start without the client library and the tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drumline.engine.lazy import lazy_names

if TYPE_CHECKING:
    from drumline.engine.client import AsyncEngine
    from drumline.engine.config import (
        CacheConfig,
        EngineConfig,
        EPLBConfig,
        FaultConfig,
        ParallelConfig,
        SchedulerConfig,
    )
    from drumline.engine.expert_records import LoadRecord
    from drumline.engine.outputs import Logprob, RankReply, RequestOutput
    from drumline.engine.sampling_params import SamplingParams
    from drumline.protocol.rebalance import rebalance_experts

__all__ = [
    "AsyncEngine",
    "CacheConfig",
    "EPLBConfig",
    "EngineConfig",
    "FaultConfig",
    "LoadRecord",
    "Logprob",
    "ParallelConfig",
    "RankReply",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "rebalance_experts",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AsyncEngine": "client",
        "CacheConfig": "config",
        "EPLBConfig": "eplb_config",
        "EngineConfig": "config",
        "FaultConfig": "config",
        "LoadRecord": "expert_records",
        "ParallelConfig": "config",
        "SchedulerConfig": "config",
        "Logprob": "outputs",
        "RankReply": "outputs",
        "RequestOutput": "outputs",
        "SamplingParams": "sampling_params",
        "rebalance_experts": ".protocol.rebalance",
    },
)
