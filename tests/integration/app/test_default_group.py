"""Engines of real ranks whose every way to torch's default process group raises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from drumline.engine import AsyncEngine, CacheConfig, EngineConfig, ParallelConfig, SamplingParams
from tests.integration.app.conftest import WITHIN_S

LAYOUTS: dict[str, dict[str, Any]] = {
    "stages": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
    "replicas": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "all2all_backend": "all_to_all",
    },
    "attention replicas": {"tensor_parallel_size": 4, "enable_dp_attention": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
async def test_no_layout_asks_for_torchs_default_process_group(name: str) -> None:
    config = EngineConfig(
        "demo",
        max_model_len=128,
        cache=CacheConfig(num_gpu_blocks_override=64),
        parallel=ParallelConfig(**LAYOUTS[name], worker_extension_cls="tests.integration.app.no_default_group.Shut"),
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    async with asyncio.timeout(WITHIN_S), AsyncEngine(config) as engine:
        outputs = [output async for output in engine.generate("Return the", params)]
        assert len(outputs[-1].token_ids) == 8
        assert [reply.value for reply in await engine.collective_rpc("default_group_is_shut")] == [True] * 4
