"""What the layers of one step share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from drumline.workers.layers import AttentionInputs
from drumline.workers.step_tokens import StepTokens

RotaryTables: TypeAlias = tuple[Tensor, Tensor]


@dataclass(slots=True, frozen=True)
class StepContext:
    """``positions`` int64 (n,) of the replica's n tokens; ``tokens``: whose tokens are whose; ``keys`` and ``values``:
    the cache, by layer of the stage (kv heads, blocks, block size, channels), no values with latent attention."""

    positions: Tensor
    attention: AttentionInputs
    tokens: StepTokens
    keys: Sequence[Tensor]
    values: Sequence[Tensor | None]
