"""What a simulated rank does for the balance of experts: all that is to come to it is there at once, and it says so."""

from __future__ import annotations

import msgspec
import numpy as np

from drumline.protocol.messages import CancelStage, I32Matrix, Staged, StageExperts, Step, StepDone


class SimulatedExperts:
    """``held``: int32 (moe_layers, slots of the rank), what stands there; they are its layers' slots from ``first`` on.
    Every slot has computed as many tokens in a step as its expert's number says, and one more. With ``mute`` it never
    says Staged."""

    def __init__(self, rank: int, held: I32Matrix, first: int, load_interval: int) -> None:
        self.rank = rank
        self.held = held.copy()
        self.mute = False
        self._first = first
        self._load_interval = load_interval
        self._stage: StageExperts | None = None

    def told(self, message: StageExperts | CancelStage) -> Staged | None:
        if isinstance(message, CancelStage):
            return Staged(message.term, message.epoch, self.rank, message.generation, dropped=True)
        self._stage = message
        return None

    def before(self, step: Step) -> Staged | None:
        """What the step carries."""
        shuffle, stage = step.shuffle, self._stage
        if shuffle is None or stage is None:
            return None
        assert shuffle.generation == stage.generation
        if shuffle.commit:
            self.held[stage.layer] = stage.placement[self._first : self._first + self.held.shape[1]]
        if self.mute or shuffle.end == 0 or shuffle.end < (len(stage.rounds) - 1) * stage.parts:
            return None
        return Staged(step.term, step.epoch, self.rank, stage.generation, 100, 0.01)

    def after(self, step: Step, done: StepDone, held: I32Matrix) -> StepDone:
        """The answer with a report of the load, where one is due; ``held``: before the step."""
        due = step.step > 0 and step.step % self._load_interval == 0
        if not due and not (step.shuffle is not None and step.shuffle.commit):
            return done
        load = np.ascontiguousarray((held + 1) * 10, dtype=np.int32)
        return msgspec.structs.replace(done, load=load, load_steps=self._load_interval)
