"""A rank's main thread: receive, step, reply."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch

from drumline.protocol.codec import config_digest
from drumline.protocol.errors import DrumlineError, ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    Call,
    CallResult,
    Configure,
    Fault,
    Leave,
    Left,
    Load,
    Loaded,
    OpenStore,
    Ready,
    Shutdown,
    Step,
    StepDone,
    ToWorker,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.stateless import StoreError
from drumline.workers.abort import EpochAborted
from drumline.workers.control import Control
from drumline.workers.epoch_groups import EpochGroups
from drumline.workers.faults import describe
from drumline.workers.groups import GroupTimeout, PeerLost
from drumline.workers.held_bytes import held_bytes
from drumline.workers.host_share import choose_device, choose_threads
from drumline.workers.loading_turn import loading_turn
from drumline.workers.model_runner import ModelRunner, NumericFault
from drumline.workers.rank_epoch import RankEpoch
from drumline.workers.remote_methods import RemoteMethods, failure, remote

log = logging.getLogger(__name__)

EXIT_LOAD_FAILED = 1

# An epoch that could not be formed is no fault of this process: it stays, with its weights, for the next one.
_EPOCH_ERRORS = (StoreError, PeerLost, GroupTimeout, ProtocolError)
# After any of these a group is of no use, whoever called it.
_GROUP_ERRORS = (EpochAborted, PeerLost, GroupTimeout)


class Worker:
    """One rank. :meth:`run` obeys the coordinator until it says Shutdown.

    A user's class may extend it (``worker_cls``, ``worker_extension_cls``); in its methods ``rank``, ``config`` and
    ``model_runner`` may be relied on, names with an underscore may not.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._me = control.identity
        self._progress = control.progress
        self._epoch = RankEpoch(control)
        self._config: WorkerConfig | None = None
        self._runner: ModelRunner | None = None
        self._sizes = (0, 0, 0)
        self._load_s = 0.0
        self._handlers: dict[type, Callable[[Any], None]] = {
            WelcomeWorker: self._welcome,
            Load: self._load,
            Leave: self._leave,
            OpenStore: self._open_store,
            Configure: self._configure,
            Step: self._step,
            Call: self._call,
        }
        self._remote = RemoteMethods(self, Worker)

    def run(self) -> int:
        """Returns the exit code: 0 after Shutdown, 1 when the model could not be loaded."""
        while True:
            self._progress.stale = self._epoch.fence.stale
            message = self._control.inbox.get()
            if isinstance(message, Shutdown):
                self._leave_epoch()
                return 0
            try:
                self._handlers[type(message)](message)
            except EpochAborted as error:
                log.info("left: %s", error.text)
                self._leave_epoch()
            except Exception as error:  # every fault of a rank is told, whatever it is
                fatal = self._runner is None and not isinstance(error, _EPOCH_ERRORS)
                self._tell_fault(error, message)
                if fatal and isinstance(message, Load | WelcomeWorker):
                    return EXIT_LOAD_FAILED

    # ----------------------------------------------------------------------------------------------- loading and epochs

    def _welcome(self, message: WelcomeWorker) -> None:
        self._config = message.config

    def _load(self, message: Load) -> None:
        """Load the model, unless it is loaded, and say so."""
        config = self._known_config()
        if self._runner is None:
            self._read_model(config, message)
        num_blocks, block_bytes, weight_bytes = self._sizes
        runner = self._loaded()
        self._control.send(
            Loaded(
                message.term,
                self._me.rank,
                config_digest(config),
                num_blocks,
                block_bytes,
                weight_bytes,
                self._load_s,
                runner.device.type,
                runner.free_bytes(),
            )
        )

    def _read_model(self, config: WorkerConfig, message: Load) -> None:
        start = time.monotonic()
        if message.num_blocks:
            config = msgspec.structs.replace(config, num_blocks=message.num_blocks)
        spec = ModelSpec.from_folder(config.model)
        runner = ModelRunner(config, spec, choose_device(config, self._me.rank), config.layout, self._me.rank)

        def progress(done: int, total: int) -> None:
            self._progress.loaded(done, total)
            self._control.abort.check_all()

        with loading_turn(config, self._control.abort.check_all):
            runner.load(np.array(message.experts, dtype=np.int32), progress)
        weight_bytes = held_bytes(runner.model)
        num_blocks, block_bytes = runner.init_kv_cache()
        self._sizes = (num_blocks, block_bytes, weight_bytes)
        self._load_s = time.monotonic() - start
        self._runner = runner
        self._progress.loaded_digest = config_digest(self._known_config())
        threads = choose_threads(config, weight_bytes)
        torch.set_num_threads(threads)
        text = "rank %d, pid %d: loaded %d bytes of weights in %.2f s, %d KV blocks, %d torch threads"
        log.info(text, self._me.rank, os.getpid(), weight_bytes, self._load_s, num_blocks, threads)

    def _leave(self, message: Leave) -> None:
        """Come out of every older epoch and say what is held."""
        if not self._epoch.fence.leave(message.term, message.epoch):
            return
        self._progress.enter_epoch(message.term, message.epoch)
        self._leave_epoch()
        runner = self._loaded()
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        self._control.send(
            Left(message.term, message.epoch, self._me.rank, runner.held(), self._sizes[0], runner.free_bytes())
        )

    def _open_store(self, message: OpenStore) -> None:
        self._epoch.open_store(message)

    def _configure(self, message: Configure) -> None:
        config, runner = self._known_config(), self._loaded()
        self._leave_epoch()
        if not self._epoch.enter(message, config, runner):
            return
        gc.collect()
        gc.freeze()  # what lives now lives long; collections from here on look at the rest
        num_blocks, block_bytes, weight_bytes = self._sizes
        self._control.send(
            Ready(
                message.term,
                message.epoch,
                self._me.rank,
                config_digest(config),
                num_blocks,
                block_bytes,
                weight_bytes,
                self._load_s,
                runner.device.type,
            )
        )

    def _leave_epoch(self) -> None:
        """Give up the groups and refuse what is left of the epoch. Never blocks."""
        self._epoch.leave(self._runner)

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, step: Step) -> None:
        if not self._epoch.fence.admit(step):
            return
        runner = self._loaded()
        counts, replica = step.num_tokens_across_dp, runner.place.replica
        self._progress.begin_step(step.step, dummy=replica >= len(counts) or not int(counts[replica]))
        out = runner.execute(step)
        self._control.send(
            StepDone(step.term, step.epoch, self._me.rank, step.step, out.tokens, out.logprob_index, out.logprobs)
        )

    # ---------------------------------------------------------------------------------------------- control calls

    @property
    def groups(self) -> EpochGroups | None:
        """The groups of the epoch that the rank is in, None outside of any."""
        return self._epoch.groups

    @property
    def rank(self) -> int:
        """The global rank."""
        return self._me.rank

    @property
    def config(self) -> WorkerConfig:
        """What the engine told this rank. Raises ProtocolError before it has."""
        return self._known_config()

    @property
    def model_runner(self) -> ModelRunner:
        """The model with its KV cache, batch table and sampler. Raises ProtocolError before it is loaded."""
        return self._loaded()

    @remote
    def expert_load(self) -> list[list[int]]:
        """Tokens computed by each expert slot of this rank, (moe_layers, slots), since it was loaded."""
        return self._loaded().expert_load.tolist()

    def _call(self, call: Call) -> None:
        """Run a method between steps and answer. What the method raises is its caller's business, not a fault."""
        if self._epoch.fence.is_stale(call.term, call.epoch):
            return
        try:
            value = self._remote.call(call.method, call.args)
        except Exception as error:
            at = self._progress.position
            me = self._me
            info = msgspec.structs.replace(
                failure(error), rank=me.rank, incarnation=me.incarnation, epoch=call.epoch, step=at.step
            )
            self._answer_call(call, b"", info)
            if isinstance(error, _GROUP_ERRORS):
                raise
        else:
            self._answer_call(call, value, None)

    def _answer_call(self, call: Call, value: bytes, error: ErrorInfo | None) -> None:
        self._control.send(CallResult(call.term, call.epoch, call.call_id, self._me.rank, error is None, value, error))

    # -------------------------------------------------------------------------------------------------------- faults

    def _tell_fault(self, error: Exception, message: ToWorker) -> None:
        info = describe(error, self._me, self._progress.position)
        # A typed error says what it means; only a surprise needs its traceback here. The coordinator gets both.
        text = info.text if isinstance(error, DrumlineError) else info.traceback
        log.error("fault in %s: %s", type(message).__name__, text)
        self._progress.faults += 1
        # Told first: the peers find out as soon as this rank leaves, and report that it is gone.
        try:
            rows = error.rows if isinstance(error, NumericFault) else ()
            self._control.send(Fault(self._epoch.fence.term, self._epoch.fence.epoch, self._me.rank, info, rows))
        finally:
            self._leave_epoch()

    def _known_config(self) -> WorkerConfig:
        if self._config is None:
            raise ProtocolError("Configure found before Welcome")
        return self._config

    def _loaded(self) -> ModelRunner:
        if self._runner is None:
            raise ProtocolError("the model is not loaded")
        return self._runner
