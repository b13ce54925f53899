"""Mixed into the ranks of ``test_collective_rpc``."""

from __future__ import annotations

import os
import time

import torch

from drumline.protocol.messages import WorkerConfig
from drumline.workers.model_runner import ModelRunner


class Probe:
    """What an app may add to a rank. ``self`` is a :class:`drumline.workers.Worker` too."""

    rank: int
    config: WorkerConfig
    model_runner: ModelRunner
    counted = 0

    def who(self) -> dict[str, int]:
        return {"rank": self.rank, "pid": os.getpid()}

    def scale(self, values: list[float], by: float = 2.0) -> list[float]:
        return (torch.tensor(values) * by * (self.rank + 1)).tolist()

    def fail_on(self, rank: int) -> str:
        if self.rank == rank:
            raise LookupError(f"rank {rank} was told to")
        return "fine"

    def nap(self, seconds: float, nonce: int = 0) -> int:
        time.sleep(seconds)
        return nonce

    def weights(self) -> torch.Tensor:
        return torch.ones(2)

    def large(self, size: int) -> bytes:
        return bytes(size)

    def about(self) -> tuple[int, int]:
        return self._vocab_size(), self.config.data_parallel_size

    def _vocab_size(self) -> int:
        return self.model_runner.spec.vocab_size
