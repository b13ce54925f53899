"""Routed experts by name: which tensors of the checkpoint make one, and how single ones are read."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.shards import RankShards
from drumline.protocol.weights import EXPERT, ModelWeights, expert_names
from drumline.workers.loading import LoadPlan, read_planned


def plan_expert(plan: LoadPlan, shards: RankShards, layer: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
    """Fill ``gate_up`` (2 * channels, hidden), the gate's rows first, and ``down`` (hidden, channels) with what
    ``shards`` have of ``expert`` in ``layer`` of the model."""
    names = expert_names(plan.weights.spec)
    block = f"model.layers.{layer}.{names.block}.experts"
    width = down.shape[1]
    for name, target in ((names.gate, gate_up[:width]), (names.up, gate_up[width:]), (names.down, down)):
        piece = plan.weights.piece(f"{block}.{EXPERT}.{name}.weight", shards)
        plan.add(f"{block}.{expert}.{name}.weight", target, piece)


class ExpertReader:
    """Reads experts of one rank's checkpoint; ``check`` is called between tensors and may raise."""

    def __init__(self, weights: ModelWeights, index: CheckpointIndex) -> None:
        self._weights = weights
        self._index = index

    def read(
        self,
        shards: RankShards,
        layer: int,
        targets: list[tuple[int, Tensor, Tensor]],
        check: Callable[[], None],
    ) -> None:
        """Read experts of ``layer`` of the model, each (expert, gate_up, down), as :func:`plan_expert` lays them out.

        What the targets hold is undefined when it raises: InvalidConfig for a checkpoint that cannot be read, or what
        ``check`` raises.
        """
        plan = LoadPlan(self._weights)
        for expert, gate_up, down in targets:
            plan_expert(plan, shards, layer, expert, gate_up, down)
        check()
        read_planned(plan, self._index, lambda done, total: check())
