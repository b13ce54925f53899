"""Routing by maps that somebody else writes to."""

from __future__ import annotations

import torch
from torch import Tensor


class ExpertMaps:
    """One layer's choice among the copies of an expert, read anew in every step.

    ``slots_of_expert`` (experts, most copies): physical slots, -1 behind the last; ``replicas`` (experts,): how many of
    them there are. A copy in the slots ``first_slot`` to ``end_slot``, which are this rank's own, is taken before
    others; other copies take turns, token by token and from step to step.
    """

    def __init__(self, slots_of_expert: Tensor, replicas: Tensor, first_slot: int, end_slot: int) -> None:
        self._slots_of_expert = slots_of_expert
        self._replicas = replicas
        self._first_slot = first_slot
        self._end_slot = end_slot
        # Ranks begin at different copies.
        self._turn = first_slot

    def slots_of(self, experts: Tensor) -> Tensor:
        """Logical experts int64 (n, K) to physical slots int64 (n, K)."""
        copies = self._slots_of_expert[experts].long()
        turns = torch.arange(self._turn, self._turn + len(experts), device=experts.device).unsqueeze(1)
        self._turn += len(experts)
        pick = turns % self._replicas[experts]
        own = (copies >= self._first_slot) & (copies < self._end_slot)
        pick = torch.where(own.any(-1), own.long().argmax(-1), pick)
        return copies.gather(-1, pick.unsqueeze(-1)).squeeze(-1)
