"""One step of a lockstep group as the scheduler decides it, before it becomes a message to each replica."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from drumline.engine.core.block_pool import I32, I64
from drumline.engine.core.request import Sequence

NO_BLOCKS = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Chunk:
    """``count`` tokens of a sequence in prefill, and the blocks that it gets for them."""

    sequence: Sequence
    count: int
    blocks: I64


@dataclass(slots=True)
class Admission(Chunk):
    """A sequence that enters a row. ``cached`` blocks come before ``blocks``."""

    cached: I64 = field(default_factory=lambda: NO_BLOCKS)


@dataclass(slots=True)
class Plan:
    """One step of the group. Only rows of ``lane`` compute. ``tokens``: int32 (replicas,). ``decoding`` rows ascend,
    ``bounds`` (replicas + 1,) says where each replica's begin; the i-th of ``grown`` rows gets ``blocks[i]``, and
    ``grown_bounds`` splits those."""

    lane: int
    tokens: I32
    decoding: I64
    bounds: I64
    grown: I64
    grown_bounds: I64
    blocks: I64
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    admissions: dict[int, list[Admission]] = field(default_factory=dict)
