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
    Member,
    OpenStore,
    Ready,
    Shutdown,
    Step,
    StepDone,
    StoreReady,
    ToWorker,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.stateless import StoreError, open_store
from drumline.workers.abort import EpochAborted
from drumline.workers.control import Control
from drumline.workers.epoch_groups import EpochGroups
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.faults import describe
from drumline.workers.fence import Fence
from drumline.workers.groups import GroupCoordinator, GroupPlace, GroupTimeout, PeerLost, form_group
from drumline.workers.held_bytes import held_bytes
from drumline.workers.host_share import choose_device, choose_threads
from drumline.workers.loading_turn import loading_turn
from drumline.workers.model_runner import ModelRunner
from drumline.workers.remote_methods import RemoteMethods, failure, remote

log = logging.getLogger(__name__)

STORE_DEADLINE_S = 30.0
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
        self._fence = Fence()
        self._config: WorkerConfig | None = None
        self._runner: ModelRunner | None = None
        self._placement: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._sizes = (0, 0, 0)
        self._load_s = 0.0
        self._store: object = None
        self.groups: EpochGroups | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            WelcomeWorker: self._welcome,
            OpenStore: self._open_store,
            Configure: self._configure,
            Step: self._step,
            Call: self._call,
        }
        self._remote = RemoteMethods(self, Worker)

    def run(self) -> int:
        """Returns the exit code: 0 after Shutdown, 1 when the model could not be loaded."""
        while True:
            self._progress.stale = self._fence.stale
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
                if fatal and isinstance(message, Configure | WelcomeWorker):
                    return EXIT_LOAD_FAILED

    # -------------------------------------------------------------------------------------------------------- epochs

    def _welcome(self, message: WelcomeWorker) -> None:
        self._config = message.config

    def _open_store(self, message: OpenStore) -> None:
        if self._fence.is_stale(message.term, message.epoch):
            return
        self._store = None  # a fixed port is free for the new store once the old one is gone
        self._store, host, port = open_store(message.host, message.port, STORE_DEADLINE_S)
        self._control.send(StoreReady(message.term, message.epoch, self._me.rank, host, port))

    def _configure(self, message: Configure) -> None:
        if not self._fence.enter(message.term, message.epoch):
            return
        self._leave_epoch()
        self._fence.broken = True  # until it is formed
        self._progress.enter_epoch(message.term, message.epoch)
        config = self._known_config()
        self._check_members(message)
        placement = np.array(message.placement, dtype=np.int32)
        if self._runner is None:
            self._load(config, placement)
        elif self._placement is None or not np.array_equal(placement, self._placement):
            raise ProtocolError(f"epoch {message.epoch} has another placement than the one that is loaded")
        runner = self._loaded()
        runner.reset()
        self._form(config, message, runner)
        gc.collect()
        gc.freeze()  # what lives now lives long; collections from here on look at the rest
        self._fence.broken = False
        num_blocks, block_bytes, weight_bytes = self._sizes
        digest = config_digest(config)
        self._control.send(
            Ready(
                message.term,
                message.epoch,
                self._me.rank,
                digest,
                num_blocks,
                block_bytes,
                weight_bytes,
                self._load_s,
                runner.device.type,
            )
        )

    def _check_members(self, message: Configure) -> None:
        """Raises ProtocolError unless this incarnation of the rank is among the epoch's members."""
        if Member(self._me.rank, self._me.incarnation) not in message.members:
            members = ", ".join(f"{member.rank}/{member.incarnation}" for member in message.members)
            me = f"{self._me.rank}/{self._me.incarnation}"
            raise ProtocolError(f"{me} is no member of the epoch; members: {members}")

    def _load(self, config: WorkerConfig, placement: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        start = time.monotonic()
        spec = ModelSpec.from_folder(config.model)
        runner = ModelRunner(config, spec, choose_device(config, self._me.rank), config.layout, self._me.rank)

        def still_wanted() -> None:
            self._control.abort.check(self._fence.term, self._fence.epoch)

        def progress(done: int, total: int) -> None:
            self._progress.loaded(done, total)
            still_wanted()

        with loading_turn(config, still_wanted):
            runner.load(placement, progress)
        weight_bytes = held_bytes(runner.model)
        num_blocks, block_bytes = runner.init_kv_cache()
        self._sizes = (num_blocks, block_bytes, weight_bytes)
        self._load_s = time.monotonic() - start
        self._placement = placement
        self._runner = runner
        threads = choose_threads(config, weight_bytes)
        torch.set_num_threads(threads)
        text = "rank %d, pid %d: loaded %d bytes of weights in %.2f s, %d KV blocks, %d torch threads"
        log.info(text, self._me.rank, os.getpid(), weight_bytes, self._load_s, num_blocks, threads)

    def _form(self, config: WorkerConfig, message: Configure, runner: ModelRunner) -> None:
        """Meet the other ranks in every group that this one belongs to."""

        def form(name: str, ranks: tuple[int, ...], connect: bool) -> GroupCoordinator:
            host, port = message.store_host, message.store_port
            place = GroupPlace(message.term, message.epoch, self._me.rank, ranks, host, port, runner.device)
            deadline_s = config.distributed_timeout_s
            return form_group(
                name, place, self._control.abort, self._progress, connect=connect, collective_deadline_s=deadline_s
            )

        backend = config.all2all_backend
        lockstep = runner.spec.is_moe
        epoch = EpochPlace.of(config.layout, [member.rank for member in message.members], self._me.rank)
        groups = EpochGroups(epoch, self._me.rank, lockstep=lockstep, all2all_backend=backend, form=form)
        self.groups = groups
        runner.meet(groups.for_steps())
        sizes = ", ".join(f"{group.name} {group.world_size}" for group in groups if group.world_size > 1)
        log.info("rank %d, epoch %d: groups %s", self._me.rank, message.epoch, sizes or "of one rank alone")

    def _leave_epoch(self) -> None:
        """Give up the groups and refuse what is left of the epoch. Never blocks."""
        self._fence.break_epoch()
        if self._runner is not None:
            self._runner.part()  # buffers given to a collective are never used again
        if self.groups is not None:
            self.groups.close()
            self.groups = None

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, step: Step) -> None:
        if not self._fence.admit(step):
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
        if self._fence.is_stale(call.term, call.epoch):
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
            self._control.send(Fault(self._fence.term, self._fence.epoch, self._me.rank, info))
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
