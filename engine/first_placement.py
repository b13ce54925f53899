"""The placement of experts that a model starts with: by a strategy, from a file, or planned from a recorded load."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from drumline.engine.load_record import Array, read_arrays
from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.configfields import read_json_object
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout, slots_per_rank
from drumline.protocol.messages import I32, NO_NUMBERS
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps, initial_placement

FIELD = "init_placement"
POLICY = "global"
"""Nothing stands anywhere yet, so that no move costs anything."""


def strategy_placement(parallel: ParallelConfig, spec: ModelSpec, layout: Layout) -> I32:
    """int32 (moe_layers, slots), by ``expert_placement_strategy``. Raises InvalidConfig."""
    # Sharded experts (no expert parallel) are all on every rank, one slot each.
    return initial_placement(
        len(spec.moe_layers),
        spec.num_experts,
        layout.ep_size,
        parallel.expert_placement_strategy,
        parallel.eplb_config.num_redundant_experts,
    )


def first_placement(parallel: ParallelConfig, spec: ModelSpec, layout: Layout) -> I32:
    """int32 (moe_layers, slots): that of the file ``init_placement`` where there is one, else the strategy's. Reads the
    file, and plans from a load in it. Raises InvalidConfig, which names the file, what was found, what is valid."""
    by_strategy = strategy_placement(parallel, spec, layout)
    name = parallel.eplb_config.init_placement
    if name is None:
        return by_strategy
    path = Path(name).expanduser()
    placement, tokens = _read(path)
    if tokens is not None:
        return _planned(path, tokens, by_strategy, spec, layout)
    return _checked(path, placement, by_strategy, spec, layout)


def _read(path: Path) -> tuple[Array, Array | None]:
    """The placement of a file, or its load."""
    arrays = _json_arrays(path) if path.suffix == ".json" else read_arrays(FIELD, path)
    # The longer names are those of files that are made for SGLang.
    tokens = next((arrays[name] for name in ("tokens", "logical_count") if name in arrays), None)
    placement = next(
        (arrays[name] for name in ("physical_to_logical", "physical_to_logical_map") if name in arrays), None
    )
    if tokens is None and placement is None:
        found = ", ".join(sorted(arrays)[:10]) or "nothing"
        raise InvalidConfig(FIELD, f"{path}: {found}", "physical_to_logical, or tokens: a load record")
    return np.zeros((0, 0), dtype=np.int32) if placement is None else placement, tokens


def _json_arrays(path: Path) -> dict[str, Array]:
    try:
        values = read_json_object(path)
    except InvalidConfig as error:
        raise InvalidConfig(
            FIELD, f"{path}: {error.found}", f"{error.valid}: {{'physical_to_logical': [[...]]}}"
        ) from error
    arrays: dict[str, Array] = {}
    for name, value in values.items():
        try:
            arrays[name] = np.array(value)
        except ValueError as error:
            raise InvalidConfig(FIELD, f"{path}: {name}: {error}", "lists of numbers, all as long") from error
    return arrays


def _checked(path: Path, placement: Array, first: I32, spec: ModelSpec, layout: Layout) -> I32:
    """A placement that somebody else made; of one by time, the last."""
    shown = f"{path}: physical_to_logical, {placement.dtype} {placement.shape}"
    if placement.ndim == 3 and len(placement):
        placement = placement[-1]
    layers, slots = first.shape
    if placement.shape != first.shape or not np.issubdtype(placement.dtype, np.integer):
        valid = (
            f"whole numbers ({layers}, {slots}): MoE layers, and slots for {spec.num_experts} experts and "
            f"{slots - spec.num_experts} redundant ones; or (time, {layers}, {slots}), whose last is taken"
        )
        raise InvalidConfig(FIELD, shown, valid)
    try:
        maps = PlacementMaps.build(placement, spec.num_experts, layout.ep_size)
    except InvalidConfig as error:
        raise InvalidConfig(FIELD, f"{path}: {error.found}", error.valid) from error
    _check_copies(path, maps, layout)
    return np.ascontiguousarray(maps.physical_to_logical)


def _check_copies(path: Path, maps: PlacementMaps, layout: Layout) -> None:
    """A second copy on a rank would take a slot and be of no use."""
    for rank in range(layout.ep_size):
        own = maps.local_slots(rank)
        held = np.sort(maps.physical_to_logical[:, own.start : own.stop], axis=1)
        twice = np.argwhere(held[:, 1:] == held[:, :-1])
        if len(twice):
            layer, place = twice[0]
            found = f"{path}: two copies of expert {held[layer, place]} of MoE layer {layer} on ep rank {rank}"
            raise InvalidConfig(FIELD, found, f"one at most: slots {own.start} to {own.stop - 1} are those of the rank")


def _planned(path: Path, tokens: Array, first: I32, spec: ModelSpec, layout: Layout) -> I32:
    """What the policy makes of a recorded load."""
    from drumline.engine.core.balance.plan import PlanRequest
    from drumline.engine.core.balance.policies import make_plan

    shown = f"{path}: tokens, {tokens.dtype} {tokens.shape}"
    if tokens.ndim == 2:
        tokens = tokens[None]
    layers = len(spec.moe_layers)
    numbers = np.issubdtype(tokens.dtype, np.integer) or np.issubdtype(tokens.dtype, np.floating)
    if not numbers or tokens.ndim != 3 or not len(tokens) or tokens.shape[1:] != (layers, spec.num_experts):
        valid = f"numbers (snapshots, {layers}, {spec.num_experts}): at least one snapshot, MoE layers, experts"
        raise InvalidConfig(FIELD, shown, valid)
    if not np.isfinite(tokens).all() or tokens.min() < 0:
        raise InvalidConfig(FIELD, f"{shown} with numbers below 0 or not finite", "finite numbers from 0")
    slots = np.array(slots_per_rank(first.shape[1], layout.ep_size), dtype=np.int32)
    request = PlanRequest(
        number=0,
        policy=POLICY,
        num_layers=layers,
        load=tokens.reshape(-1, spec.num_experts).astype(np.float32),
        placement=first,
        slots=slots,
        nodes=np.zeros(layout.ep_size, dtype=np.int32),
        dead=NO_NUMBERS,
        max_moved=1.0,
        min_gain=0.0,
    )
    plan = make_plan(request, time.perf_counter)
    if plan.error:
        raise InvalidConfig(FIELD, f"{path}: {plan.error}", "a load that a placement can be planned from")
    return plan.placement
