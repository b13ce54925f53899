"""A text that a driver's model is made to write, whatever it would choose: its logits, to be compared position by
position."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from tests.parity.stepdriver import StepDriver, Stream


def forced_logits(driver: StepDriver, text: list[int], prompt_len: int) -> Tensor:
    """float32 (len(text) - prompt_len + 1, vocabulary): after the prompt, and after each token that follows it in
    ``text``. The prompt is computed in chunks, the rest one token a step. For a driver of one replica."""
    (replica,) = driver.replicas
    model, follows, seen = replica.runner.model, [*text[prompt_len:], 0], []
    original = model.logits

    def choose(hidden: Tensor) -> Tensor | None:
        logits = original(hidden)
        assert logits is not None
        assert len(logits) == 1
        seen.append(logits[0].clone())
        return torch.zeros_like(logits).index_fill_(1, torch.tensor([follows[len(seen) - 1]]), 1.0)

    stream = Stream(text[:prompt_len], len(follows))
    with mock.patch.object(model, "logits", choose):
        driver.run([[stream]])
    assert stream.generated == follows
    return torch.stack(seen)


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of each position: the difference's norm relative to that of ``expected``."""
    relative: Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return relative
