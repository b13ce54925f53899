"""Placement plans over a series of expert loads: each from the placement before, as an engine would make them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import msgspec
import numpy as np

from drumline.engine.bench.scheduler import Machine, machine
from drumline.engine.core.balance.measure import balancedness, rank_loads
from drumline.engine.core.balance.plan import POLICIES, PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32Matrix
from drumline.protocol.placement import PlacementMaps

F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
I32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

EXPERT_BYTES = 44_040_192
"""An expert of DeepSeek-R1 in FP8: three matrices of 7168 x 2048."""
WINDOW = 8
"""As many snapshots as an engine gives its policy."""


class EplbSetup(msgspec.Struct, frozen=True):
    """Who holds slots, and the rules of the plans. ``nodes`` share the ranks out evenly, in order, and ranks the slots;
    the first get one more. ``groups``: expert groups of the model. ``expert_bytes``: of one expert in one layer.
    ``window``: each plan of incremental sees so many loads, its own the last; the others see theirs alone."""

    slots: int
    ranks: int
    nodes: int = 1
    groups: int = 1
    policy: str = "incremental"
    max_moved: float = 0.25
    min_gain: float = 0.01
    expert_bytes: int = EXPERT_BYTES
    window: int = WINDOW

    def check(self, num_experts: int) -> None:
        """Raises InvalidConfig for what cannot be."""
        for name in ("slots", "ranks", "nodes", "groups", "expert_bytes", "window"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, getattr(self, name), "a whole number from 1")
        for name in ("max_moved", "min_gain"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidConfig(name, getattr(self, name), "a share from 0 to 1")
        if self.policy not in POLICIES:
            raise InvalidConfig("policy", self.policy, "one of " + ", ".join(POLICIES))
        if not num_experts <= self.slots <= num_experts * self.ranks:
            valid = f"{num_experts} to {num_experts * self.ranks}, a slot for every expert and none twice on a rank"
            raise InvalidConfig("slots", f"{self.slots} for {num_experts} experts on {self.ranks} ranks", valid)
        if self.ranks > self.slots:
            raise InvalidConfig("ranks", f"{self.ranks} with {self.slots} slots", "as many as slots, or fewer")
        if self.nodes > self.ranks:
            raise InvalidConfig("nodes", f"{self.nodes} for {self.ranks} ranks", "as many as ranks, or fewer")

    def slot_counts(self) -> I32:
        """int32 (ranks,): slots of each."""
        return np.array(slots_per_rank(self.slots, self.ranks), dtype=np.int32)

    def slot_rank(self) -> I32:
        """int32 (slots,): whose each is."""
        return np.repeat(np.arange(self.ranks, dtype=np.int32), self.slot_counts())

    def node_of_rank(self) -> I32:
        """int32 (ranks,): the node of each."""
        return np.repeat(np.arange(self.nodes, dtype=np.int32), slots_per_rank(self.ranks, self.nodes))

    def start(self, layers: int, experts: int) -> I32Matrix:
        """Where everything starts: all experts, then copies of them in turn. int32 (layers, slots)."""
        return np.tile(np.arange(self.slots, dtype=np.int32) % experts, (layers, 1))


class EplbPlan(msgspec.Struct, frozen=True):
    """The plan made at time ``t``. ``balancedness``: on the load of that time, ``balancedness_before`` with the
    placement before; ``balancedness_next``: on the load of the next time, None at the last; ``balancedness_start``: on
    this load, had nothing ever been moved. ``slots_moved``: how many hold another expert than before, over all layers;
    ``bytes_moved`` between ranks, ``cross_node_bytes`` of them between nodes. ``single_copy``: experts, over all
    layers, with one copy."""

    t: int
    solve_ms: float
    balancedness: float
    balancedness_next: float | None
    slots_moved: int
    bytes_moved: int
    reason: str
    balancedness_before: float
    balancedness_start: float
    cross_node_bytes: int
    single_copy: int


class EplbReport(msgspec.Struct, frozen=True):
    """``times``, ``layers``, ``experts``: of the loads. ``source``: where they are from."""

    machine: Machine
    source: str
    setup: EplbSetup
    times: int
    layers: int
    experts: int
    plans: tuple[EplbPlan, ...]


class EplbTrace(msgspec.Struct, frozen=True, eq=False):
    """What pictures are drawn from, float64. ``rank_load`` (times, ranks): a rank's load over the mean rank's, the
    mean over layers; ``layer_balance`` (times, layers): balancedness; both by stage: ``start``, as if nothing had been
    moved, ``before`` and ``after`` the plan of that time. ``placements``: int32 (times, layers, slots), those planned.
    """

    rank_load: dict[str, F64]
    layer_balance: dict[str, F64]
    placements: I32


def run(
    loads: F64, setup: EplbSetup, source: str, on_plan: Callable[[EplbPlan], None] = lambda _: None
) -> tuple[EplbReport, EplbTrace]:
    """Plan at each time of ``loads``, float64 (times, layers, experts). ``on_plan`` is called with each plan.

    Raises InvalidConfig for sizes that cannot be, also those that the policy does not take.
    """
    times, layers, experts = loads.shape
    setup.check(experts)
    bench = _Bench(loads, setup)
    plans = []
    for plan in bench.plans():
        plans.append(plan)
        on_plan(plan)
    return EplbReport(machine(), source, setup, times, layers, experts, tuple(plans)), bench.trace()


class _Bench:
    def __init__(self, loads: F64, setup: EplbSetup) -> None:
        self._loads = loads
        self._setup = setup
        self._slots, self._slot_rank, self._nodes = setup.slot_counts(), setup.slot_rank(), setup.node_of_rank()
        self._start = setup.start(*loads.shape[1:])
        self._placements: list[I32] = []

    def plans(self) -> Iterator[EplbPlan]:
        standing = self._start
        for t, load in enumerate(self._loads):
            plan = self._plan(t, standing)
            after = plan.placement
            PlacementMaps.build(after, self._loads.shape[2], self._setup.ranks, self._slots)
            following = self._loads[t + 1] if t + 1 < len(self._loads) else None
            yield EplbPlan(
                t=t,
                solve_ms=round(plan.solve_ms, 3),
                balancedness=self._balance(load, after),
                balancedness_next=None if following is None else self._balance(following, after),
                slots_moved=int(np.count_nonzero(after != standing)),
                bytes_moved=plan.bytes_moved,
                reason=plan.reason,
                balancedness_before=self._balance(load, standing),
                balancedness_start=self._balance(load, self._start),
                cross_node_bytes=plan.cross_node_bytes,
                single_copy=plan.single_copy,
            )
            self._placements.append(after)
            standing = after

    def trace(self) -> EplbTrace:
        after = self._placements
        stages = {"start": [self._start] * len(after), "before": [self._start, *after[:-1]], "after": after}
        rank_load, layer_balance = {}, {}
        for stage, placements in stages.items():
            pairs = list(zip(self._loads, placements, strict=True))
            rank_load[stage] = np.stack([self._relative(load, one) for load, one in pairs])
            layer_balance[stage] = np.stack([balancedness(load, one, self._slot_rank) for load, one in pairs])
        return EplbTrace(rank_load, layer_balance, np.stack(after))

    def _plan(self, t: int, standing: I32Matrix) -> PlacementPlan:
        setup, layers = self._setup, self._loads.shape[1]
        window = setup.window if setup.policy == "incremental" else 1
        seen = self._loads[max(0, t + 1 - window) : t + 1].astype(np.float32)
        request = PlanRequest(
            number=t,
            policy=setup.policy,
            num_layers=layers,
            load=seen.reshape(len(seen) * layers, -1),
            placement=standing,
            slots=self._slots,
            nodes=self._nodes,
            dead=np.zeros(0, dtype=np.int32),
            num_groups=setup.groups,
            expert_bytes=setup.expert_bytes,
            max_moved=setup.max_moved,
            min_gain=setup.min_gain,
        )
        plan = make_plan(request, time.perf_counter)
        if plan.error:
            sizes = f"{setup.slots} slots, {setup.ranks} ranks, {setup.nodes} nodes, {setup.groups} groups"
            raise InvalidConfig("policy", f"{setup.policy} for {sizes}", "sizes that it takes", plan.error)
        return plan

    def _balance(self, load: F64, placement: I32) -> float:
        return float(balancedness(load, placement, self._slot_rank).mean())

    def _relative(self, load: F64, placement: I32) -> F64:
        """float64 (ranks,): each rank's load over the mean rank's; the mean over layers that have load."""
        ranks = rank_loads(load, placement, self._slot_rank)
        mean = ranks.mean(axis=1, keepdims=True)
        relative: F64 = (ranks[mean[:, 0] > 0] / mean[mean[:, 0] > 0]).sum(axis=0) / max(int((mean > 0).sum()), 1)
        return relative
