"""A worker's part in moving experts between steps: orders, what steps carry, what is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import NO_MATRIX, CancelStage, I32Matrix, StageExperts, Step, WorkerConfig
from drumline.workers.control import Control
from drumline.workers.experts.shuffler import Shuffler
from drumline.workers.fence import Fence
from drumline.workers.injection import FaultInjector

if TYPE_CHECKING:
    from drumline.workers.model_runner import ModelRunner

POLL_S = 0.002
"""How often it is looked for experts that are on their way while there is nothing else to do."""


class MovingExperts:
    """What the main thread does with its runner's :class:`Shuffler`, within the epoch of ``fence``."""

    def __init__(self, control: Control, fence: Fence, injector: FaultInjector) -> None:
        self._control = control
        self._fence = fence
        self._injector = injector

    def stage(self, message: StageExperts, runner: ModelRunner) -> None:
        """Begin, or count what comes too late or again. Raises ProtocolError."""
        if self._fence.in_force(message.term, message.epoch) and not _shuffler(message, runner).stage(message):
            self._fence.stale += 1

    def cancel(self, message: CancelStage, runner: ModelRunner) -> None:
        """Give up, or count what comes too late or again. Raises ProtocolError."""
        if self._fence.in_force(message.term, message.epoch) and not _shuffler(message, runner).cancel(message):
            self._fence.stale += 1

    def before_step(self, step: Step, runner: ModelRunner, config: WorkerConfig) -> tuple[I32Matrix, int]:
        """Begin what the step carries. Returns the expert load, if it is to be told with this step: int32 (layers of
        the stage, slots), or (0, 0), and the steps that it covers. Raises ProtocolError, PeerLost, EpochAborted."""
        shuffler, shuffle = runner.experts.shuffler, step.shuffle
        load, steps = NO_MATRIX, 0
        if shuffler is None:
            if shuffle is not None:
                raise ProtocolError(f"step {step.step} found a rank whose experts do not move")
            return load, steps
        is_due = config.load_interval > 0 < step.step and step.step % config.load_interval == 0
        if is_due or (shuffle is not None and shuffle.commit):
            load, steps = shuffler.load.take()
        if step.num_tokens_across_dp.any():
            shuffler.load.count_step()
        if shuffle is not None:
            shuffler.begin_step(shuffle, lambda point: self._injector.reach(point, step=step.step))
        return load, steps

    def awaits(self, runner: ModelRunner | None) -> bool:
        """Whether experts are on their way, or there is something to say of them."""
        shuffler = None if runner is None or self._fence.broken else runner.experts.shuffler
        return shuffler is not None and shuffler.pending

    def poll(self, runner: ModelRunner | None) -> None:
        """Take in what has come, and say so when it is all. Waits for nobody. Raises ProtocolError, PeerLost,
        EpochAborted."""
        if runner is None or not self.awaits(runner) or runner.experts.shuffler is None:
            return
        staged = runner.experts.shuffler.poll(self._fence.term, self._fence.epoch)
        if staged is not None:
            self._control.send(staged)


def _shuffler(message: StageExperts | CancelStage, runner: ModelRunner) -> Shuffler:
    if runner.experts.shuffler is None:
        raise ProtocolError(f"{type(message).__name__} found a rank whose experts do not move")
    return runner.experts.shuffler
