"""Workers that die of what they compute."""

from __future__ import annotations

from drumline.protocol.messages import Step
from drumline.workers import Worker
from drumline.workers.injection import strike

POISON = 2047
"""The token id that kills."""


class Poisonable(Worker):
    """Dies by SIGSEGV in a step into whose batch ``POISON`` comes."""

    def _step(self, step: Step) -> None:
        if any(POISON in admitted.tokens for admitted in step.admitted):
            strike("segv")
        super()._step(step)
