"""The flags that describe an engine, and the :class:`EngineConfig` that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from drumline.engine.config import (
    DTYPES,
    PLACEMENT_STRATEGIES,
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
)

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--model", default="demo", show_default=True, metavar="PATH", help='Model folder, or "demo".'),
    click.option("--tokenizer", metavar="PATH", help="Tokenizer folder or tokenizer.json; default: the model's own."),
    click.option("--served-model-name", metavar="NAME", help="What the model is called in outputs."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Data type of weights and activations; default: auto."),
    click.option("--max-model-len", type=int, metavar="N", help="Longest context in tokens; default: the model's own."),
    click.option(
        "--data-parallel-size",
        "-dp",
        type=int,
        metavar="N",
        help="Engine replicas that serve side by side; default: 1.",
    ),
    click.option(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", help="Ranks that share each layer; default: 1."
    ),
    click.option("--pipeline-parallel-size", "-pp", type=int, metavar="N", help="Pipeline stages; default: 1."),
    click.option(
        "--enable-expert-parallel", is_flag=True, default=None, help="Split the experts of each layer over the ranks."
    ),
    click.option(
        "--expert-placement-strategy",
        type=click.Choice(PLACEMENT_STRATEGIES),
        help="Which rank holds which experts; default: linear.",
    ),
    click.option(
        "--max-num-seqs", type=int, metavar="N", help="Sequences that run together, per replica; default: 256."
    ),
    click.option(
        "--max-num-batched-tokens", type=int, metavar="N", help="Tokens per step, per replica; default: 2048."
    ),
    click.option("--block-size", type=int, metavar="N", help="Tokens per KV block; default: 16."),
    click.option("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="KV cache of each rank."),
    click.option("--num-gpu-blocks-override", type=int, metavar="N", help="KV blocks of each rank."),
    click.option("--gpu-memory-utilization", type=float, metavar="F", help="Share of GPU memory to use; default: 0.9."),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=None,
        help="Reuse KV of equal prefixes; default: on.",
    ),
    click.option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        default=None,
        help="Spread long prompts over steps; default: on.",
    ),
    click.option(
        "--async-scheduling/--no-async-scheduling", default=None, help="Plan a step while one runs; default: on."
    ),
]
_PARALLEL = (
    "data_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_expert_parallel",
    "expert_placement_strategy",
)
_CACHE = (
    "block_size",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "gpu_memory_utilization",
    "enable_prefix_caching",
)
_SCHEDULER = ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling")
_ENGINE = ("model", "tokenizer", "served_model_name", "dtype", "max_model_len")
ENGINE_OPTIONS = (*_ENGINE, *_PARALLEL, *_CACHE, *_SCHEDULER)


def engine_options(command: F) -> F:
    """Adds the flags to a command, which gets them as keyword arguments; what was not given is None."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def engine_config(flags: dict[str, Any], seed: int | None) -> EngineConfig:
    """The configuration; defaults stand in one place, the settings themselves. Raises InvalidConfig."""

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: flags[name] for name in names if flags[name] is not None}

    seeds: dict[str, Any] = {} if seed is None else {"seed": seed}
    return EngineConfig(
        **given(_ENGINE),
        **seeds,
        parallel=ParallelConfig(**given(_PARALLEL)),
        cache=CacheConfig(**given(_CACHE)),
        scheduler=SchedulerConfig(**given(_SCHEDULER)),
    )
