"""The placement of experts that a model starts with: by a strategy, from a file, or planned from a recorded load."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from drumline.engine.config import EngineConfig
from drumline.engine.core.balance.plan import PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.engine.expert_records import F64, LoadRecord, read_expert_placement, save_placements
from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import Layout, slots_per_rank
from drumline.protocol.messages import I32, NO_NUMBERS, I32Matrix
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps, initial_placement

FIELD = "init_placement"
OWN_FILE = "placement.npz"
PLANS = 3
"""At most so many, each from the one before: nothing stands anywhere yet, so that no move costs anything."""


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
    found = read_expert_placement(path, FIELD)
    if isinstance(found, LoadRecord):
        return _planned(path, found.tokens, by_strategy, spec, layout)
    return _checked(path, found, by_strategy, spec, layout)


def with_own_file(config: EngineConfig, placement: I32 | None, folder: str) -> EngineConfig:
    """The same engine, which finds the placement that it starts with in ``folder``: whoever follows a coordinator reads
    it there, whatever has become of the user's file. Raises DrumlineError when it cannot be written."""
    eplb = config.parallel.eplb_config
    if eplb.init_placement is None or placement is None:
        return config
    own = Path(folder) / OWN_FILE
    save_placements(own, placement[None])
    eplb = msgspec.structs.replace(eplb, init_placement=str(own))
    parallel = msgspec.structs.replace(config.parallel, eplb_config=eplb)
    return msgspec.structs.replace(config, parallel=parallel)


def _checked(path: Path, placement: I32Matrix, first: I32, spec: ModelSpec, layout: Layout) -> I32:
    """A placement that somebody else made."""
    if placement.shape != first.shape:
        layers, slots = first.shape
        valid = (
            f"({layers}, {slots}): MoE layers, and slots for {spec.num_experts} experts and "
            f"{slots - spec.num_experts} redundant ones"
        )
        raise InvalidConfig(FIELD, f"physical_to_logical of shape {placement.shape} in {path}", valid)
    try:
        maps = PlacementMaps.build(placement, spec.num_experts, layout.ep_size)
    except InvalidConfig as error:
        raise InvalidConfig(FIELD, f"{error.found} in {path}", error.valid) from error
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
            found = f"two copies of expert {held[layer, place]} of MoE layer {layer} on ep rank {rank} in {path}"
            raise InvalidConfig(FIELD, found, f"one at most: slots {own.start} to {own.stop - 1} are those of the rank")


def _planned(path: Path, tokens: F64, first: I32, spec: ModelSpec, layout: Layout) -> I32:
    """What the policy makes of a recorded load."""
    layers = len(spec.moe_layers)
    if tokens.shape[1:] != (layers, spec.num_experts):
        valid = f"(snapshots, {layers}, {spec.num_experts}): MoE layers and experts of the model"
        raise InvalidConfig(FIELD, f"tokens of shape {tokens.shape} in {path}", valid)
    slots = np.array(slots_per_rank(first.shape[1], layout.ep_size), dtype=np.int32)
    request = PlanRequest(
        number=0,
        policy="incremental",
        num_layers=layers,
        load=tokens.reshape(-1, spec.num_experts).astype(np.float32),
        placement=first,
        slots=slots,
        nodes=np.zeros(layout.ep_size, dtype=np.int32),
        dead=NO_NUMBERS,
        max_moved=1.0,
        min_gain=0.0,
    )
    placement = first
    for _ in range(PLANS):
        plan = make_plan(msgspec.structs.replace(request, placement=placement), time.perf_counter)
        if plan.error:
            raise InvalidConfig(FIELD, f"{plan.error}: {path}", "a load that a placement can be planned for")
        placement = plan.placement
        if not len(plan.moves):
            break
    return placement
