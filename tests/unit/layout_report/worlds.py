"""Small models, and the report of one of them in a layout."""

from __future__ import annotations

from typing import Any

import msgspec

from drumline.engine.config import CacheConfig, EngineConfig, ParallelConfig
from drumline.engine.layout_report.question import Question, ask
from drumline.engine.layout_report.report import LayoutReport, report
from drumline.protocol.modelspec import MlaSpec, ModelSpec
from tests.unit.specs import DENSE, EXPERTS

MOE = msgspec.structs.replace(DENSE, architecture="Qwen3MoeForCausalLM", moe=EXPERTS)
LATENT = msgspec.structs.replace(
    MOE,
    architecture="DeepseekV3ForCausalLM",
    num_kv_heads=1,
    head_dim=24,
    mla=MlaSpec(q_lora_rank=32, kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16),
    moe=msgspec.structs.replace(EXPERTS, shared_intermediate_size=24),
)
WORLD: dict[str, Any] = {"data_parallel_size": 2, "pipeline_parallel_size": 2, "tensor_parallel_size": 2}


def question(
    model: ModelSpec | str,
    *,
    name: str = "small",
    num_gpus: int | None = None,
    gpu_memory: int | None = None,
    cache: CacheConfig | None = None,
    max_model_len: int | None = None,
    **sizes: Any,
) -> Question:
    """About a known model by name, or about a shape."""
    spec = None if isinstance(model, str) else model
    config = EngineConfig(
        model=model if isinstance(model, str) else name,
        parallel=ParallelConfig(**sizes),
        cache=cache or CacheConfig(),
        max_model_len=max_model_len,
    )
    return ask(config, spec=spec, num_gpus=num_gpus, gpu_memory=gpu_memory)


def report_on(model: ModelSpec | str, **options: Any) -> LayoutReport:
    """The report of that question."""
    return report(question(model, **options))
