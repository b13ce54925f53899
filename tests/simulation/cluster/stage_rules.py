"""What a StageExperts must be, and what all ranks of the stage have said and done about it so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.balance.config import BalanceConfig
from drumline.protocol.messages import I32, StageExperts
from tests.simulation.cluster.expert_slots import ExpertSlots
from tests.simulation.cluster.rank_layer import Move
from tests.simulation.worker import RuleBrokenError


@dataclass(slots=True, eq=False)
class StageRecord:
    """One StageExperts. ``ranks``: those of the layer's stage that compute. ``staged`` and ``answered``: who has said
    Staged, and who has answered the step ``commit_step``."""

    message: StageExperts
    ranks: frozenset[int]
    moves: Sequence[Move]
    staged: set[int] = field(default_factory=set)
    answered: set[int] = field(default_factory=set)
    commit_step: int = -1

    def same(self, other: StageExperts) -> bool:
        """Whether every rank is told the same."""
        ours = self.message
        arrays = ("placement", "fetches", "rounds")
        return (ours.layer, ours.parts) == (other.layer, other.parts) and all(
            np.array_equal(getattr(ours, name), getattr(other, name)) for name in arrays
        )


def stage_record(message: StageExperts, now: I32, experts: ExpertSlots, num_experts: int) -> StageRecord:
    """Of the first StageExperts of its generation. ``now``: int32 (slots,), what the layer holds. Raises
    :class:`RuleBrokenError` for one that does not lead from there to its placement."""
    order = [member.rank for member in experts.configure.members]
    layer, where = message.layer, f"generation {message.generation} of layer {message.layer}"
    if message.placement.shape != now.shape or set(message.placement.tolist()) != set(range(num_experts)):
        raise RuleBrokenError(f"{where} is to be placed as {message.placement.tolist()}, of {num_experts} experts")
    bounds = message.rounds.tolist()
    if bounds[0] != 0 or bounds[-1] != len(message.fetches) or sorted(set(bounds)) != bounds or message.parts < 1:
        raise RuleBrokenError(f"{where}: rounds {bounds} of {len(message.fetches)} fetches, {message.parts} parts")
    moves: list[Move] = []
    for number, (of_layer, slot, source, source_slot) in enumerate(message.fetches.tolist()):
        place, own = experts.receiver(layer, slot)
        if of_layer != layer or source not in order:
            raise RuleBrokenError(f"{where}: a fetch of layer {of_layer} from rank {source}")
        nth = int(np.searchsorted(message.rounds, number, side="right")) - 1
        moves.append(Move(nth, int(message.placement[slot]), source, source_slot, order[place], own))
    changed = np.flatnonzero(message.placement != now).tolist()
    if sorted(message.fetches[:, 1].tolist()) != changed:
        raise RuleBrokenError(f"{where} fetches slots {message.fetches[:, 1].tolist()}, {changed} change")
    _check_rounds(where, moves)
    ranks = frozenset(order[place] for place in experts.places_of(layer))
    if any(not {move.source, move.receiver} <= ranks for move in moves):
        raise RuleBrokenError(f"{where}: experts travel between stages: {moves}")
    return StageRecord(message, ranks, moves)


def _check_rounds(where: str, moves: Sequence[Move]) -> None:
    """In a round no rank sends twice, receives twice, or copies twice."""
    seen: set[tuple[int, str, int]] = set()
    for move in moves:
        local = [(move.round, "copies", move.receiver)]
        busy = local if move.is_local else [(move.round, "sends", move.source), (move.round, "receives", move.receiver)]
        for one in busy:
            if one in seen:
                raise RuleBrokenError(f"{where}: rank {one[2]} {one[1]} twice in round {one[0]}: {moves}")
            seen.add(one)


def check_bytes(rank: int, moves: Sequence[Move], parts: int, config: BalanceConfig) -> None:
    """``moves``: of the parts that are started, or copied home, beside one step; ``parts``: in how many an expert is
    cut there. One part may always be."""
    size = -(-config.expert_bytes // parts)
    most = max(config.bytes_per_step, size)
    for what, count in (
        ("sends", sum(move.source == rank and not move.is_local for move in moves)),
        ("receives", sum(move.receiver == rank and not move.is_local for move in moves)),
        ("copies", sum(move.receiver == rank and move.is_local for move in moves)),
    ):
        if count * size > most:
            raise RuleBrokenError(f"rank {rank} {what} {count * size} bytes beside a step, at most {most}")
