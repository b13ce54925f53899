"""What ranks say of their life: that they have loaded, left, are ready, beat, or have failed; no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from drumline.engine.core.decisions import Leased, Loading, Output, Tell
from drumline.engine.core.epochs import Epochs
from drumline.engine.core.first_start import FirstStart
from drumline.engine.core.losses import Losses
from drumline.engine.core.members import (
    GroupRecord,
    GroupStage,
    MembershipConfig,
    RankRecord,
    RankState,
    Refusals,
)
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    BeatWorker,
    CallResult,
    Event,
    Fault,
    FromWorker,
    HelloWorker,
    Injected,
    Left,
    Loaded,
    Ready,
    Staged,
    StepDone,
    StoreReady,
)

_OfEpoch = StoreReady | Ready | StepDone | CallResult | Left | Staged


def injected(message: Injected) -> list[Output]:
    """A rank brings a fault upon itself. Its end may be known before this is read."""
    text = f"rank {message.rank}: injected fault {message.number}: {message.text}"
    return [Tell(Event("injected", text, message.rank, message.number, incarnation=message.incarnation))]


class RankMessages:
    """Messages of processes that are the present one of their rank."""

    def __init__(
        self,
        config: MembershipConfig,
        groups: Sequence[GroupRecord],
        refusals: Refusals,
        epochs: Epochs,
        losses: Losses,
        first: FirstStart,
    ) -> None:
        self._config = config
        self._groups = groups
        self._refusals = refusals
        self._epochs = epochs
        self._losses = losses
        self._first = first

    def current(self, record: RankRecord, message: _OfEpoch) -> bool:
        """Whether the message is of the rank's group's present (term, epoch)."""
        if (message.term, message.epoch) == (self._config.term, self._groups[record.group].epoch):
            return True
        self._refusals.stale += 1
        return False

    def hear(self, record: RankRecord, message: FromWorker, now: float) -> list[Output]:
        """What follows from anything but a Hello, StepDone, CallResult and Staged."""
        if isinstance(message, BeatWorker):
            return self._beat(record, message, now)
        if isinstance(message, Fault):
            return self._fault(record, message, now)
        if isinstance(message, Injected):
            return injected(message)
        if isinstance(message, Loaded):
            return self._loaded(record, message, now)
        if isinstance(message, HelloWorker | StepDone | CallResult | Staged) or not self.current(record, message):
            return []
        if isinstance(message, StoreReady):
            return self._epochs.store_ready(record, message, now)
        if isinstance(message, Ready):
            wrong = self._wrong(message.digest, message.num_blocks)
            return self._unfit(record, wrong, now) if wrong else self._ready(record, message, now)
        return self._left(record, message, now)

    def _beat(self, record: RankRecord, beat: BeatWorker, now: float) -> list[Output]:
        outputs: list[Output] = []
        loaded = (beat.load_done, beat.load_total)
        if beat.load_total > 0 and loaded != (record.load_done, record.load_total):
            record.load_done, record.load_total = loaded
            record.progress_at = now
            if record.state is RankState.STARTING:
                outputs.append(Loading(record.rank, beat.load_done, beat.load_total))
        group = self._groups[record.group]
        if (beat.term, beat.epoch) != (self._config.term, group.epoch):
            return outputs  # of an epoch that it has yet to come out of: a sign of life
        progress = (beat.step, beat.collective, beat.inside)
        if progress != (record.step, record.collective, record.inside):
            record.step, record.collective, record.inside = progress
            record.progress_at = now
        # Inside a collective it waits for others, whose time is not its own to lengthen.
        lease_s = 0.0 if beat.inside else beat.lease_s
        if lease_s > 0 or record.leased:
            record.leased = lease_s > 0
            outputs.append(Leased(record.rank, group.id, beat.step, lease_s))
        return outputs

    def _fault(self, record: RankRecord, message: Fault, now: float) -> list[Output]:
        group = self._groups[record.group]
        known = message.epoch in (group.epoch, record.epoch) and message.term == self._config.term
        # Before its first epoch a rank knows none, and before its Welcome no term.
        if not known and not (message.epoch < 1 and message.term <= self._config.term and not record.has_weights):
            self._refusals.stale += 1
            return []
        if message.epoch == record.faulted:
            # A rank has one fault in an epoch: it is out of it then.
            self._refusals.out_of_order += 1
            return []
        record.faulted = message.epoch
        failed = self._first.fault(record, message)
        return self._losses.fault(record, message, now) if failed is None else failed

    def _loaded(self, record: RankRecord, message: Loaded, now: float) -> list[Output]:
        # A process that has loaded while the next coordinator welcomed it has said so to the one before.
        if message.term > self._config.term:
            self._refusals.stale += 1
            return []
        if record.state is not RankState.STARTING or record.has_weights:
            self._refusals.out_of_order += 1
            return []
        wrong = self._wrong(message.digest, message.num_blocks)
        if not wrong and message.num_blocks < record.num_blocks:
            wrong = f"has loaded with {message.num_blocks} KV blocks, the process before it had {record.num_blocks}"
        if wrong:
            return self._unfit(record, wrong, now)
        record.loaded = message
        record.has_weights = True
        record.state = RankState.PARKED
        record.num_blocks = message.num_blocks
        record.progress_at = now
        outputs = self._told_loaded(record, message.weight_bytes)
        group = self._groups[record.group]
        if group.opened:
            text = f"rank {record.rank} (pid {record.pid}) has loaded in {message.load_s:.3f} s"
            event = Event("parked", text, record.rank, group=group.id, incarnation=record.incarnation)
            outputs.append(Tell(event))
        return outputs + self._epochs.consider(group, now)

    def _told_loaded(self, record: RankRecord, weight_bytes: int) -> list[Output]:
        if (record.load_done, record.load_total) == (weight_bytes, weight_bytes):
            return []
        # A load between two beats is told too.
        record.load_done = record.load_total = weight_bytes
        return [Loading(record.rank, weight_bytes, weight_bytes)]

    def _left(self, record: RankRecord, message: Left, now: float) -> list[Output]:
        group = self._groups[record.group]
        epoch, leaving = group.epoch, group.stage is GroupStage.LEAVING
        outputs = self._epochs.left(record, message, now)
        if leaving and (group.epoch != epoch or group.stage is not GroupStage.LEAVING):
            outputs += self._losses.settle(group, now) + self._losses.hopeless()
        return outputs

    def _ready(self, record: RankRecord, message: Ready, now: float) -> list[Output]:
        if record.loaded is None:
            record.loaded = Loaded(
                message.term,
                record.rank,
                message.digest,
                message.num_blocks,
                message.block_bytes,
                message.weight_bytes,
                message.load_s,
                message.device,
            )
        return self._epochs.ready(record, message, now)

    def _wrong(self, digest: str, num_blocks: int) -> str:
        if digest != self._config.digest:
            return f"computed config digest {digest}, the coordinator {self._config.digest}"
        if num_blocks < 1:
            return f"is ready with {num_blocks} KV blocks; at least 1 is needed"
        return ""

    def _unfit(self, record: RankRecord, wrong: str, now: float) -> list[Output]:
        error = ErrorInfo(kind="protocol", text=f"rank {record.rank} {wrong}", rank=record.rank)
        if not self._first.over:
            return self._first.fails(error)
        return self._losses.lose([record], "protocol", [error], now)
