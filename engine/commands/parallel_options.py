"""The flags that say over how many ranks an engine is spread and who starts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from drumline.engine.commands.eplb_options import EPLB_FLAGS, EPLB_OPTIONS, eplb_config
from drumline.engine.config import ALL2ALL_BACKENDS, EXECUTOR_BACKENDS, PLACEMENT_STRATEGIES, ParallelConfig
from drumline.protocol.errors import InvalidConfig

F = TypeVar("F", bound=Callable[..., Any])


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Whole numbers with commas between them."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        text = f"{value!r} is not whole numbers with commas between them, such as 2,3,2"
        raise click.BadParameter(text, ctx, param) from None


def _choices(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def _refuse(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """What the settings say of a field of vLLM's that is not there yet."""
    if value is None or param.name is None:
        return
    field: dict[str, Any] = {param.name: value}
    try:
        ParallelConfig(**field)
    except InvalidConfig as error:
        raise click.UsageError(error.text, ctx) from None


def refuse_not_yet(command: F) -> F:
    """Adds the flags of :data:`ParallelConfig.not_yet`, with a value or without: each is refused by name."""
    for name in ParallelConfig.not_yet:
        flag = f"--{name.replace('_', '-')}"
        command = click.option(
            flag, is_flag=False, flag_value="True", hidden=True, expose_value=False, callback=_refuse
        )(command)
    return command


SIZE_OPTIONS = [
    click.option(
        "--tensor-parallel-size", "-tp", type=int, metavar="N", help="Ranks that share each layer; default: 1."
    ),
    click.option("--pipeline-parallel-size", "-pp", type=int, metavar="N", help="Pipeline stages; default: 1."),
    click.option(
        "--data-parallel-size", "-dp", type=int, metavar="N", help="Engine replicas side by side; default: 1."
    ),
    click.option(
        "--enable-expert-parallel",
        is_flag=True,
        default=None,
        help="Split the experts of a layer over the ranks of its stage; without it each expert is sharded over them.",
    ),
    click.option(
        "--expert-placement-strategy",
        type=click.Choice(PLACEMENT_STRATEGIES),
        help="Which rank holds which experts; default: linear.",
    ),
    click.option(
        "--enable-dp-attention",
        is_flag=True,
        default=None,
        help="Where tp exceeds the KV heads: several KV caches with rows of their own, no copies of one.",
    ),
    click.option("--pipeline-partition", callback=_layers, metavar="N,N,...", help="Layers of each stage."),
    click.option("--enable-eplb", is_flag=True, default=None, help="Experts move between ranks as their load changes."),
    click.option(
        "--num-redundant-experts", type=int, metavar="N", help="Slots beyond one for each expert; default: 0."
    ),
    click.option(
        "--init-expert-placement", metavar="FILE", help="Placement to start with, or load record to plan it from."
    ),
]
"""Those that say who holds what of a model."""
PARALLEL_OPTIONS = [
    *SIZE_OPTIONS,
    click.option(
        "--all2all-backend",
        metavar="NAME",
        help=f"How tokens reach their experts: {_choices(ALL2ALL_BACKENDS)}; default: {ALL2ALL_BACKENDS[0]}.",
    ),
    click.option(
        "--distributed-executor-backend",
        metavar="NAME",
        help=f"Who starts the ranks: {_choices(EXECUTOR_BACKENDS)}; default: mp.",
    ),
    click.option("--data-parallel-size-local", type=int, metavar="N", help="Replicas started here; default: all."),
    click.option("--data-parallel-rank", type=int, metavar="N", help="The first replica that is started here."),
    click.option(
        "--data-parallel-rank-local",
        type=int,
        metavar="N",
        help="Its place on the devices, in replicas; default: 0.",
    ),
    click.option(
        "--data-parallel-master-ip", metavar="IP", help="Where stores and worker socket listen; default: 127.0.0.1."
    ),
    click.option("--data-parallel-master-port", type=int, metavar="PORT", help="Of the epoch's store; default: any."),
    click.option(
        "--data-parallel-rpc-port", type=int, metavar="PORT", help="Of the worker socket; default: an ipc socket."
    ),
    click.option("--data-parallel-backend", metavar="NAME", help="Who starts replicas: mp."),
    click.option("--max-parallel-loading-workers", type=int, metavar="N", help="Ranks that load at once."),
    click.option("--worker-cls", metavar="MODULE.CLASS", help="The class of every rank; default: auto."),
    click.option("--worker-extension-cls", metavar="MODULE.CLASS", help="A class whose methods every rank gets."),
    click.option(
        "--distributed-timeout", type=float, metavar="SECONDS", help="Deadline of a collective; default: 120."
    ),
    *EPLB_OPTIONS,
]
PARALLEL_FIELDS = tuple(ParallelConfig.__struct_fields__)
PARALLEL_FLAGS = (*PARALLEL_FIELDS, *EPLB_FLAGS)
"""What the flags of :data:`PARALLEL_OPTIONS` are called as keyword arguments."""


def parallel_config(flags: Mapping[str, Any]) -> ParallelConfig:
    """The configuration that flags make; one that was not given is None or not there. Raises InvalidConfig."""
    given = {name: flags[name] for name in PARALLEL_FIELDS if flags.get(name) is not None}
    eplb = eplb_config(given.pop("eplb_config", None), flags)
    return ParallelConfig(**given, eplb_config=eplb)


def describe_sizes(parallel: ParallelConfig) -> str:
    """``4 ranks, tensor parallel 2, pipeline 2, expert parallel``: what is more than one, and what is on."""
    ranks = parallel.world_size_across_dp
    parts = [f"{ranks} rank{'s' if ranks > 1 else ''}"]
    for name, label in (("tensor", "tensor parallel"), ("pipeline", "pipeline"), ("data", "data parallel")):
        size = getattr(parallel, f"{name}_parallel_size")
        # Replicas of one rank each are what the number of ranks says already.
        if size > 1 and not (name == "data" and parallel.world_size == 1):
            parts.append(f"{label} {size}")
    if parallel.enable_dp_attention:
        parts.append("data parallel attention")
    if parallel.enable_expert_parallel:
        parts.append("expert parallel")
    if parallel.enable_eplb:
        redundant = parallel.eplb_config.num_redundant_experts
        parts.append("experts balanced" + (f", {redundant} redundant" if redundant else ""))
    return ", ".join(parts)
