"""The flags that describe an engine, and the :class:`EngineConfig` that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from drumline.engine.commands.parallel_options import PARALLEL_FLAGS, PARALLEL_OPTIONS, parallel_config, refuse_not_yet
from drumline.engine.config import DTYPES, CacheConfig, EngineConfig, SchedulerConfig
from drumline.protocol.errors import InvalidConfig

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--model", default="demo", show_default=True, metavar="PATH", help='Model folder, or "demo".'),
    click.option("--tokenizer", metavar="PATH", help="Tokenizer folder or tokenizer.json; default: the model's own."),
    click.option("--served-model-name", metavar="NAME", help="What the model is called in outputs."),
    click.option(
        "--dtype",
        metavar="NAME",
        help=f"Of the weights: {', '.join(DTYPES)}; default: auto, the checkpoint's.",
    ),
    click.option("--max-model-len", type=int, metavar="N", help="Longest context in tokens; default: the model's own."),
    *PARALLEL_OPTIONS,
    click.option(
        "--max-num-seqs", type=int, metavar="N", help="Sequences that run together, per replica; default: 256."
    ),
    click.option(
        "--max-num-batched-tokens", type=int, metavar="N", help="Tokens per step, per replica; default: 2048."
    ),
    click.option("--block-size", type=int, metavar="N", help="Tokens per KV block; default: 16."),
    click.option("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="KV cache of each rank."),
    click.option(
        "--kv-cache-dtype", metavar="NAME", help=f"Of the KV cache: {', '.join(DTYPES)}; default: auto, the model's."
    ),
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
        "--journal",
        metavar="FILE",
        help="Keep accepted requests and their tokens here; default: in the engine's private folder.",
    ),
    click.option("--no-journal", is_flag=True, default=None, help="Keep none."),
    click.option(
        "--async-scheduling/--no-async-scheduling", default=None, help="Plan a step while one runs; default: on."
    ),
]
_CACHE = (
    "block_size",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "kv_cache_dtype",
)
_SCHEDULER = ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling")
_ENGINE = ("model", "tokenizer", "served_model_name", "dtype", "max_model_len", "journal")
ENGINE_OPTIONS = (*_ENGINE, "no_journal", *PARALLEL_FLAGS, *_CACHE, *_SCHEDULER)


def engine_options(command: F) -> F:
    """Adds the flags to a command, which gets them as keyword arguments; what was not given is None."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return refuse_not_yet(command)


def engine_config(flags: dict[str, Any], seed: int | None) -> EngineConfig:
    """The configuration; defaults stand in one place, the settings themselves. Raises InvalidConfig."""

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: flags[name] for name in names if flags[name] is not None}

    if flags["no_journal"] and flags["journal"] is not None:
        raise InvalidConfig(
            "no_journal", f"--journal {flags['journal']} beside it", "one of --journal and --no-journal"
        )
    more: dict[str, Any] = {} if seed is None else {"seed": seed}
    if flags["no_journal"]:
        more["journal"] = "off"
    return EngineConfig(
        **given(_ENGINE),
        **more,
        parallel=parallel_config(flags),
        cache=CacheConfig(**given(_CACHE)),
        scheduler=SchedulerConfig(**given(_SCHEDULER)),
    )
