"""A rank's model from the order to load it: the runner with what is told of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import msgspec
import numpy as np
import torch

from drumline.protocol.codec import config_digest
from drumline.protocol.messages import Leave, Left, Load, Loaded, Ready, WorkerConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.workers.held_bytes import held_bytes
from drumline.workers.host_share import choose_device, choose_threads
from drumline.workers.loading_turn import loading_turn
from drumline.workers.model_runner import ModelRunner

log = logging.getLogger(__name__)


class LoadedModel:
    """Weights and KV cache of ``rank``, which live for as long as the process."""

    def __init__(
        self,
        config: WorkerConfig,
        rank: int,
        order: Load,
        progress: Callable[[int, int], None],
        check: Callable[[], None],
    ) -> None:
        """Load as ``order`` says. ``progress`` is told the bytes read and in all; ``check`` raises when the process is
        to end. Raises InvalidConfig for a model that cannot be loaded so, StartFailed when no turn to load comes."""
        start = time.monotonic()
        self._digest = config_digest(config)
        self._rank = rank
        if order.num_blocks:
            config = msgspec.structs.replace(config, num_blocks=order.num_blocks)
        spec = ModelSpec.from_folder(config.model)
        self.runner = ModelRunner(config, spec, choose_device(config, rank), config.layout, rank)
        with loading_turn(config, check):
            self.runner.load(np.array(order.experts, dtype=np.int32), progress)
        self._weight_bytes = held_bytes(self.runner.model)
        self._num_blocks, self._block_bytes = self.runner.init_kv_cache()
        self._load_s = time.monotonic() - start
        threads = choose_threads(config, self._weight_bytes)
        torch.set_num_threads(threads)
        text = "rank %d, pid %d: loaded %d bytes of weights in %.2f s, %d KV blocks, %d torch threads"
        log.info(text, rank, os.getpid(), self._weight_bytes, self._load_s, self._num_blocks, threads)

    @property
    def digest(self) -> str:
        """Of the configuration that it was loaded for."""
        return self._digest

    def loaded(self, term: int) -> Loaded:
        """The answer to Load."""
        return Loaded(
            term,
            self._rank,
            self._digest,
            self._num_blocks,
            self._block_bytes,
            self._weight_bytes,
            self._load_s,
            self.runner.device.type,
            self.runner.free_bytes(),
        )

    def left(self, order: Leave) -> Left:
        """The answer to Leave, once the device is idle."""
        runner = self.runner
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        return Left(
            order.term,
            order.epoch,
            self._rank,
            runner.held(),
            self._num_blocks,
            runner.free_bytes(),
            runner.experts.num_spare,
        )

    def ready(self, term: int, epoch: int) -> Ready:
        """The answer to Configure, once the epoch is formed."""
        return Ready(
            term,
            epoch,
            self._rank,
            self._digest,
            self._num_blocks,
            self._block_bytes,
            self._weight_bytes,
            self._load_s,
            self.runner.device.type,
        )
