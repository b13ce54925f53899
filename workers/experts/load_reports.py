"""What a rank reports of the tokens that its expert slots compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.messages import NO_MATRIX, I32Matrix
from drumline.workers.experts.expert_layer import ExpertLayer, loads


class LoadReports:
    """The counters of ``layers`` since the last report, in an epoch. The device is waited for by :meth:`take` alone."""

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._layers = tuple(layers)
        self._told: Tensor | None = None
        self._steps = 0

    def begin(self) -> None:
        """An epoch begins: what was counted before is not told."""
        self._told, self._steps = self._counts(), 0

    def count_step(self) -> None:
        """A step with tokens is about to run."""
        self._steps += 1

    def take(self) -> tuple[I32Matrix, int]:
        """Tokens that each slot has computed since the last report, int32 (layers of the stage, slots), and in how many
        steps."""
        if self._told is None:
            return NO_MATRIX, 0
        counts, steps, self._steps = self._counts(), self._steps, 0
        # Very long intervals may count more than travels: a negative load would be the end of this rank.
        most = torch.iinfo(torch.int32).max
        since: I32Matrix = (counts - self._told).clamp(max=most).cpu().numpy().astype(np.int32)
        self._told = counts
        return since, steps

    def recount(self, layer: ExpertLayer) -> None:
        """Counters of ``layer`` were set anew, after a report."""
        if self._told is not None:
            self._told[self._layers.index(layer)] = layer.moe.experts.load

    def _counts(self) -> Tensor:
        device = self._layers[0].moe.experts.load.device if self._layers else torch.device("cpu")
        return loads(self._layers, device)
