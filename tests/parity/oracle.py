"""transformers as the judge of our logits and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# At a first difference, candidates closer than this are a tie (float32).
TIE_MARGIN = 1e-4


@dataclass(frozen=True)
class Verdict:
    """How one greedy stream compares: ``difference`` is the first position where the judge would choose otherwise, or
    -1; ``margin`` the distance of the two candidates' scores there."""

    difference: int
    margin: float

    @property
    def equal(self) -> bool:
        """The same tokens, or a tie at the first difference."""
        return self.difference < 0 or self.margin < TIE_MARGIN

    @property
    def tie(self) -> bool:
        return self.difference >= 0 and self.equal


class Oracle:
    """A checkpoint in transformers, computed in ``dtype``."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """float32 (len(tokens), vocabulary)."""
        logits: Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits.float()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What transformers' own generate gives, never stopping early."""
        ids = torch.tensor([prompt])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return [int(token) for token in out[0, len(prompt) :]]

    def judge(self, prompt: list[int], generated: list[int]) -> Verdict:
        """Whether ``generated`` is the greedy continuation of ``prompt``.

        One pass over the whole text: up to the first difference both have the same prefix, so the judge's choice at
        each position of ours is what its own generation would have chosen.
        """
        logits = self.logits(prompt + generated)[len(prompt) - 1 : -1]
        ours = torch.tensor(generated)
        wrong = (logits.argmax(-1) != ours).nonzero()
        if not len(wrong):
            return Verdict(-1, 0.0)
        at = int(wrong[0])
        return Verdict(at, float(logits[at].max() - logits[at, ours[at]]))


@cache
def oracle_of(folder: Path) -> Oracle:
    """The oracle of a checkpoint, loaded once."""
    return Oracle(folder)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
