"""What is told of the balance of experts: reports of plans, lines for the log, the status; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from drumline.engine.core.balance.places import I64
from drumline.engine.core.balance.plan import PlacementPlan
from drumline.engine.core.balance.shuffle import Moved
from drumline.engine.core.balance.window import F64, balance_of
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix, RebalanceReport
from drumline.protocol.status import EplbStatus, LayerBalance


@dataclass(slots=True)
class Ledger:
    """Since the start of the term."""

    plans: int = 0
    slots_moved: int = 0
    bytes_moved: int = 0
    last_plan: str = ""


def untouched(outcome: str, reason: str) -> RebalanceReport:
    """That nothing was planned."""
    return RebalanceReport(outcome, reason)


def report_of(plan: PlacementPlan, policy: str, outcome: str, why: str, seconds: float) -> RebalanceReport:
    """What became of ``plan``, which ``policy`` made; ``why``: where it is not what the plan itself says."""
    return RebalanceReport(
        outcome=outcome,
        reason=why or plan.reason,
        policy=policy,
        balancedness_before=plan.balancedness_before,
        balancedness=plan.balancedness,
        solve_ms=plan.solve_ms,
        seconds=seconds,
        single_copy=plan.single_copy,
    )


def carried_out(report: RebalanceReport, moved: Moved, before: I32Matrix, after: I32Matrix) -> RebalanceReport:
    """With what has changed from the placement ``before`` to the one ``after``."""
    layer, slot = np.nonzero(before != after) if before.shape == after.shape else (NOWHERE, NOWHERE)
    moves = np.stack([layer, slot, before[layer, slot], after[layer, slot]], axis=1).astype(np.int32)
    return msgspec.structs.replace(
        report, slots_moved=moved.slots, bytes_moved=moved.bytes, layers=moved.layers, moves=moves
    )


NOWHERE = np.zeros(0, dtype=np.int64)


def check_placement(placement: I32Matrix, standing: I32Matrix, slots: I32, num_experts: int) -> None:
    """Raises InvalidConfig for a placement that the engine cannot have in place of ``standing``. ``slots``: int32 (ep
    ranks,), how many each rank has."""
    shape = standing.shape
    if placement.shape != shape:
        raise InvalidConfig("plan", f"{placement.shape}", f"int32 {shape}, (moe layers, physical slots)")
    if placement.min() < 0 or placement.max() >= num_experts:
        raise InvalidConfig("plan", f"experts {placement.min()} to {placement.max()}", f"0 to {num_experts - 1}")
    for layer, row in enumerate(placement):
        missing = np.flatnonzero(np.bincount(row, minlength=num_experts) == 0)
        if len(missing):
            raise InvalidConfig("plan", f"no slot for expert {missing[0]} of MoE layer {layer}", "one or more")
    # A second copy on a rank takes a slot and is of no use; a rank with more slots than experts cannot do without.
    had = np.maximum(_on_ranks(standing, slots, num_experts), 1)
    twice = (_on_ranks(placement, slots, num_experts) > had) & (slots <= num_experts)[None, :, None]
    if twice.any():
        layer, rank, expert = np.argwhere(twice)[0]
        found = f"several copies of expert {expert} of MoE layer {layer} on ep rank {rank}"
        raise InvalidConfig("plan", found, f"one at most: of {slots.tolist()} slots on ranks")


def _on_ranks(placement: I32Matrix, slots: I32, num_experts: int) -> I64:
    """int64 (layers, ranks, experts): how many copies each rank has."""
    layers, ranks = len(placement), len(slots)
    key = (np.arange(layers)[:, None] * ranks + np.repeat(np.arange(ranks), slots)) * num_experts + placement
    return np.bincount(key.ravel(), minlength=layers * ranks * num_experts).reshape(layers, ranks, num_experts)


def count_single(placement: I32Matrix, num_experts: int) -> int:
    """Experts with one copy, over all layers."""
    return sum(int(np.count_nonzero(np.bincount(row, minlength=num_experts) == 1)) for row in placement)


def balance_line(step: int, steps: int, rank_tokens: F64) -> str:
    """One line for the log."""
    mean, most, balance = balance_of(rank_tokens / max(steps, 1))
    return (
        f"eplb: step {step}: avg_tokens={mean.sum():.2f}, max_tokens={most.sum():.2f}, "
        f"balancedness={balance.mean():.4f} over {steps} steps"
    )


def eplb_status(
    policy: str,
    state: str,
    layers_left: int,
    ledger: Ledger,
    steps: int,
    rank_tokens: F64,
    generations: Sequence[int],
    single_copy: int,
) -> EplbStatus:
    """The status of the window that ``rank_tokens``, float64 (layers, ep ranks), over ``steps`` steps are of."""
    layers: tuple[LayerBalance, ...] = ()
    if steps:
        each = zip(*(part.tolist() for part in balance_of(rank_tokens / steps)), generations, strict=True)
        layers = tuple(LayerBalance(mean, most, balance, generation) for mean, most, balance, generation in each)
    return EplbStatus(
        policy=policy,
        state=state,
        balancedness=sum(one.balancedness for one in layers) / len(layers) if layers else 1.0,
        avg_tokens=sum(one.avg_tokens for one in layers),
        max_tokens=sum(one.max_tokens for one in layers),
        window_steps=steps,
        layers=layers,
        single_copy=single_copy,
        plans=ledger.plans,
        slots_moved=ledger.slots_moved,
        bytes_moved=ledger.bytes_moved,
        layers_left=layers_left,
        last_plan=ledger.last_plan,
    )
