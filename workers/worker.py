"""A rank's main thread: receive, step, reply."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from drumline.protocol.errors import DrumlineError, ErrorInfo, ProtocolError
from drumline.protocol.messages import (
    Call,
    CallResult,
    CancelStage,
    Configure,
    Fault,
    Leave,
    Load,
    OpenStore,
    Shutdown,
    StageExperts,
    Step,
    StepDone,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.stateless import StoreError
from drumline.workers.abort import EpochAborted
from drumline.workers.control import Control
from drumline.workers.epoch_groups import EpochGroups
from drumline.workers.faults import describe
from drumline.workers.groups import GroupTimeout, PeerLost
from drumline.workers.inbox import CoordinatorLost, Order, Trigger
from drumline.workers.injection import FaultInjector, points_of
from drumline.workers.loaded_model import LoadedModel
from drumline.workers.model_runner import ModelRunner, NumericFault
from drumline.workers.moving_experts import POLL_S, MovingExperts
from drumline.workers.rank_epoch import RankEpoch
from drumline.workers.remote_methods import RemoteMethods, failure, remote

log = logging.getLogger(__name__)

EXIT_LOAD_FAILED = 1
WARM_UP_STEPS = 3
WARM_UP_LEASE_S = 60.0
"""How long each of a process's first ``WARM_UP_STEPS`` with tokens may take: memory is touched, kernels are chosen."""

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
        self._model: LoadedModel | None = None
        self._has_computed = False
        self._warm_steps = 0
        self._injections = control.faults.waiting
        self._injector = FaultInjector(
            self._injections,
            tell=lambda one: control.outbox.put_and_flush(control.faults.injected(one)),
            finish=control.finish,
            spoil=lambda: self._loaded().spoil_next_logits(),
        )
        self._experts = MovingExperts(control, self._epoch.fence, self._injector)
        self._handlers: dict[type, Callable[[Any], None]] = {
            WelcomeWorker: self._welcome,
            Load: self._load,
            Leave: self._leave,
            OpenStore: self._open_store,
            Configure: self._configure,
            Step: self._step,
            Call: self._call,
            StageExperts: self._stage,
            CancelStage: self._cancel_stage,
            CoordinatorLost: self._lose_coordinator,
            Trigger: self._trigger,
        }
        self._remote = RemoteMethods(self, Worker)

    def run(self) -> int:
        """Returns the exit code: 0 after Shutdown, 1 when the model could not be loaded."""
        while True:
            self._progress.stale = self._epoch.fence.stale
            message = self._next_order()
            if isinstance(message, Shutdown):
                self._leave_epoch()
                return 0
            try:
                self._handlers[type(message)](message)
            except EpochAborted as error:
                log.info("left: %s", error.text)
                self._leave_epoch()
            except Exception as error:  # every fault of a rank is told, whatever it is
                fatal = self._model is None and not isinstance(error, _EPOCH_ERRORS)
                self._tell_fault(error, message)
                if fatal and isinstance(message, Load | WelcomeWorker):
                    return EXIT_LOAD_FAILED

    def _next_order(self) -> Order:
        """Waits for it; meanwhile what experts are on their way is taken in."""
        while True:
            awaits = self._experts.awaits(None if self._model is None else self._model.runner)
            order = self._control.inbox.get(POLL_S if awaits else None)
            if order is not None:
                return order
            try:
                self._poll_experts()
            except EpochAborted as error:
                log.info("left: %s", error.text)
                self._leave_epoch()
            except Exception as error:  # as of an order
                self._tell_fault(error, None)

    # ----------------------------------------------------------------------------------------------- loading and epochs

    def _welcome(self, message: WelcomeWorker) -> None:
        self._config = message.config

    def _load(self, message: Load) -> None:
        """Load the model, unless it is loaded, and say so."""
        if self._model is None:
            begin, check = self._progress.loaded, self._control.abort.check_all

            def progress(done: int, total: int) -> None:
                begin(done, total)
                check()
                self._injector.reach("loading")

            self._model = LoadedModel(self._known_config(), self._me.rank, message, progress, check)
            self._progress.loaded_digest = self._model.digest
        self._control.send(self._model.loaded(message.term))

    def _leave(self, message: Leave) -> None:
        """Come out of every older epoch and say what is held."""
        if not self._epoch.fence.leave(message.term, message.epoch):
            return
        self._progress.enter_epoch(message.term, message.epoch)
        self._leave_epoch()
        self._injector.reach("leave")
        self._control.send(self._known_model().left(message))

    def _open_store(self, message: OpenStore) -> None:
        self._epoch.open_store(message)

    def _configure(self, message: Configure) -> None:
        config, runner = self._known_config(), self._loaded()
        if not self._epoch.enter(message, config, runner, lambda: self._regroups(message)):
            return
        self._has_computed = self._has_computed or message.role == "compute"
        gc.collect()
        gc.freeze()  # what lives now lives long; collections from here on look at the rest
        self._progress.open_epoch()
        self._control.send(self._known_model().ready(message.term, message.epoch))

    def _regroups(self, message: Configure) -> None:
        joins = message.role == "compute" and not self._has_computed
        self._injector.reach("regroup", *(("joining",) if joins else ()))

    def _lose_coordinator(self, order: CoordinatorLost) -> None:
        log.info("out of the epoch: %s", order.text)
        self._leave_epoch()

    def _trigger(self, order: Trigger) -> None:
        self._injector.bring(order.injection)

    def _leave_epoch(self) -> None:
        """Give up the groups and refuse what is left of the epoch. Never blocks."""
        self._epoch.leave(None if self._model is None else self._model.runner)

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, step: Step) -> None:
        if not self._epoch.fence.admit(step):
            return
        runner, progress = self._loaded(), self._progress
        counts, replica = step.num_tokens_across_dp, runner.place.replica
        computes = replica < len(counts) and int(counts[replica]) > 0
        progress.begin_step(step.step, dummy=not computes)
        warms_up = computes and self._warm_steps < WARM_UP_STEPS
        if warms_up:
            self._warm_steps += 1
            self._control.grant_lease(WARM_UP_LEASE_S)
        if self._injections.armed:
            self._injector.reach(*points_of(step, computes), step=step.step)
        load, load_steps = self._experts.before_step(step, runner, self._known_config())
        start = time.monotonic()
        out = runner.execute(step)
        self._injector.stretch(time.monotonic() - start, self._epoch.check)
        progress.end_step()
        if warms_up:
            self._control.grant_lease(0.0)
        sampled = (out.tokens, out.logprob_index, out.logprobs)
        self._control.send(StepDone(step.term, step.epoch, self._me.rank, step.step, *sampled, load, load_steps))
        self._poll_experts()

    # ----------------------------------------------------------------------------------------- experts that move

    def _stage(self, message: StageExperts) -> None:
        self._experts.stage(message, self._loaded())

    def _cancel_stage(self, message: CancelStage) -> None:
        self._experts.cancel(message, self._loaded())

    def _poll_experts(self) -> None:
        self._experts.poll(None if self._model is None else self._model.runner)

    @remote
    def expert_state(self) -> list[tuple[int, int, list[int], list[int]]]:
        """For each MoE layer of the stage: its number, the generation that it was last changed by in this epoch, the
        expert in each slot, and the canary that came with it."""
        layers = self._loaded().experts.layers
        return [(one.number, one.generation, one.held.tolist(), one.canary.tolist()) for one in layers]

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
        """Tokens computed by each expert slot of this rank since its expert came, (MoE layers of the stage, slots)."""
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

    def _tell_fault(self, error: Exception, message: Order | None) -> None:
        info = describe(error, self._me, self._progress.position)
        # A typed error says what it means; only a surprise needs its traceback here. The coordinator gets both.
        text = info.text if isinstance(error, DrumlineError) else info.traceback
        log.error("fault in %s: %s", "experts on their way" if message is None else type(message).__name__, text)
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

    def _known_model(self) -> LoadedModel:
        if self._model is None:
            raise ProtocolError("the model is not loaded")
        return self._model

    def _loaded(self) -> ModelRunner:
        return self._known_model().runner
