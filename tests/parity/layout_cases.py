"""Which layouts are compared with transformers on real processes, and for which models."""

from __future__ import annotations

from dataclasses import dataclass

from drumline.engine import ParallelConfig

MAIN_MODELS = ("qwen3-moe-wide", "llama-wide", "deepseek-v3-wide")
OTHER_MODELS = ("qwen2-wide", "qwen3-wide", "mixtral-wide", "deepseek-v2-wide")
DENSE = ("llama-wide", "llama-kv2", "qwen2-wide", "qwen3-wide")
LATENT = ("deepseek-v2-wide", "deepseek-v3-wide")


@dataclass(frozen=True)
class Case:
    """One model in one layout."""

    model: str
    layout: str
    parallel: ParallelConfig

    @property
    def title(self) -> str:
        return f"{self.model}:{self.layout}"


def cases_of(model: str) -> list[Case]:
    """Every layout that ``model`` is compared in. Without experts there is no expert parallelism."""
    moe = model not in DENSE
    layouts = {
        "tp2": ParallelConfig(tensor_parallel_size=2),
        "tp4": ParallelConfig(tensor_parallel_size=4),
        "pp2": ParallelConfig(pipeline_parallel_size=2),
        "pp3": ParallelConfig(pipeline_parallel_size=3),
        "tp2-pp2": ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
        "dp2-tp2": ParallelConfig(data_parallel_size=2, tensor_parallel_size=2),
        "dp2-tp2-ep": ParallelConfig(data_parallel_size=2, tensor_parallel_size=2, enable_expert_parallel=moe),
        "dp2-pp2-ep": ParallelConfig(data_parallel_size=2, pipeline_parallel_size=2, enable_expert_parallel=moe),
        "dp4-ep": ParallelConfig(data_parallel_size=4, enable_expert_parallel=moe),
        "dp2-tp2-ep-all-to-all": ParallelConfig(
            data_parallel_size=2,
            tensor_parallel_size=2,
            enable_expert_parallel=moe,
            all2all_backend="all_to_all" if moe else "allgather_reducescatter",
            expert_placement_strategy="round_robin" if moe else "linear",
        ),
    }
    if model in LATENT:
        layouts["dp2-tp2-attn-dp"] = ParallelConfig(
            data_parallel_size=2, tensor_parallel_size=2, enable_dp_attention=True
        )
        layouts["tp4-attn-dp"] = ParallelConfig(tensor_parallel_size=4, enable_dp_attention=True)
    if not moe:
        del layouts["dp2-tp2-ep"], layouts["dp2-tp2-ep-all-to-all"]
    return [Case(model, name, parallel) for name, parallel in layouts.items()]


KV2_CASES = [
    Case(model, "tp4-kv2-attn-dp", ParallelConfig(tensor_parallel_size=4, enable_dp_attention=True))
    for model in ("llama-kv2", "qwen3-moe-kv2")
]
MAIN_CASES = [*KV2_CASES, *(case for model in MAIN_MODELS for case in cases_of(model))]
OTHER_CASES = [case for model in OTHER_MODELS for case in cases_of(model)]

_IN_SUITE = {
    "qwen3-moe-wide:tp2",
    "llama-wide:tp4",
    "deepseek-v3-wide:pp2",
    "qwen3-moe-wide:pp3",
    "deepseek-v3-wide:tp2-pp2",
    "qwen3-moe-wide:dp2-tp2",
    "deepseek-v3-wide:dp2-tp2-ep",
    "qwen3-moe-wide:dp2-pp2-ep",
    "deepseek-v3-wide:dp4-ep",
    "qwen3-moe-kv2:tp4-kv2-attn-dp",
    "llama-kv2:tp4-kv2-attn-dp",
    "deepseek-v3-wide:dp2-tp2-attn-dp",
    "llama-wide:pp3",
    "mixtral-wide:dp2-tp2-ep-all-to-all",
    "qwen2-wide:tp2-pp2",
    "deepseek-v2-wide:tp2",
}
SUITE_CASES = [case for case in (*MAIN_CASES, *OTHER_CASES) if case.title in _IN_SUITE]
