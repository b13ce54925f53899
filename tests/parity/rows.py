"""Sequences and the rows of a replica, as whoever plans steps sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from drumline.protocol.messages import Admit, LogprobEntry, SamplingSpec
from drumline.workers.model_runner import ModelRunner

GREEDY = SamplingSpec(temperature=0.0)


@dataclass
class Stream:
    """One sequence and what came of it. ``logits``: one row per generated token."""

    prompt: list[int]
    max_tokens: int
    sampling: SamplingSpec = GREEDY
    generated: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    decoding: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def done(self) -> bool:
        return len(self.generated) >= self.max_tokens


class Replica:
    """One replica's rows as the planner sees them. ``runner`` is the rank that reports, one of ``ranks``."""

    def __init__(self, ranks: Sequence[ModelRunner], reporting: int, num_lanes: int) -> None:
        self.ranks = ranks
        self.runner = runner = ranks[reporting]
        self.reporting = reporting
        self.num_lanes = num_lanes
        self.lanes: dict[int, int] = {}
        self.rows: dict[int, Stream] = {}
        self.waiting: list[Stream] = []
        self.free = list(range(runner.batch.num_blocks - 1, -1, -1))
        self.cached: dict[tuple[int, ...], int] = {}
        self.captured: list[Tensor] = []
        self.dummy_steps = 0
        self.restates = False
        original = runner.model.logits

        def capture(hidden: Tensor) -> Tensor | None:
            logits = original(hidden)
            assert logits is not None
            self.captured.append(logits.clone())
            return logits

        mock.patch.object(runner.model, "logits", capture).start()

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or any(not stream.done for stream in self.rows.values())


def admission(row: int, stream: Stream, lane: int) -> Admit:
    tokens, blocks = int32(stream.tokens), int32(stream.blocks)
    return Admit(row, tokens, len(stream.prompt), stream.computed, blocks, stream.sampling, lane)


def int32(values: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Read-only, as arrays are that come off the wire."""
    array = np.array(values, dtype=np.int32)
    array.setflags(write=False)
    return array
