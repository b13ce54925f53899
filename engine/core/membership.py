"""Who belongs to the engine: messages in, messages out, with deadlines; no I/O.

A start: the supervisor says hello; every rank is spawned with a launch token drawn for it alone, or is started by
somebody else who was given the token of all such ranks; its Hello is checked (token, version, incarnation) and
welcomed. When all ranks of a lockstep group are there, the group's epoch forms, which
:mod:`~drumline.engine.core.epochs` sees to. Every message that is waited for has a deadline; who misses it is lost.

Identity is (rank, incarnation). A launch token admits one incarnation of a rank: a second Hello is refused and counted,
as is everything from a peer that has not said Hello, that speaks for another rank, or that belongs to an older
(term, epoch).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from drumline.engine.core.epochs import Epochs
from drumline.engine.core.evidence import Evidence
from drumline.engine.core.members import (
    GroupRecord,
    GroupStage,
    Loading,
    MembershipConfig,
    Output,
    RankRecord,
    RankState,
    Refusals,
    ToOwner,
    ToPeer,
)
from drumline.engine.core.silent_rank import blame_silent_rank
from drumline.engine.core.start_deadlines import overdue_rank, waiting_for
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    BeatWorker,
    CallResult,
    Exited,
    Fault,
    FromWorker,
    HelloSupervisor,
    HelloWorker,
    Ready,
    Spawn,
    Spawned,
    StepDone,
    StoreReady,
    WelcomeWorker,
)

SILENCE_S = 10.0
"""A rank that has said Hello and is not heard for so long is lost; it beats every second."""


class Membership:
    """The start of an engine and the life of its ranks. ``new_token`` draws an unguessable launch token."""

    def __init__(self, config: MembershipConfig, new_token: Callable[[], str], now: float) -> None:
        self._config = config
        self._new_token = new_token
        self._started_at = now
        self._owner: bytes | None = None
        self._owner_heard_at = now
        self.supervisor_pid = 0
        self.groups = [GroupRecord(number, tuple(ranks)) for number, ranks in enumerate(config.groups)]
        self.ranks = {rank: RankRecord(rank, group.id) for group in self.groups for rank in group.ranks}
        for rank in config.external_ranks:
            self.ranks[rank].token = config.launch_token
            self.ranks[rank].progress_at = now
        self._rank_of: dict[bytes, RankRecord] = {}
        self._evidence = Evidence()
        self.refusals = Refusals()
        self.epochs = Epochs(config, self.groups, self.ranks, self._evidence, self.refusals)

    @property
    def all_ready(self) -> bool:
        """Whether the epoch of every group is open."""
        return all(group.stage is GroupStage.OPEN for group in self.groups)

    @property
    def owner(self) -> bytes | None:
        """The socket identity of the supervisor, once it has said hello."""
        return self._owner

    @property
    def peers(self) -> tuple[bytes, ...]:
        """The socket identities of all ranks that have said Hello, lost ones too: their processes may live on."""
        return tuple(self._rank_of)

    @property
    def awaited(self) -> tuple[int, ...]:
        """The ranks that somebody else starts and that have not said Hello yet, ascending."""
        return tuple(rank for rank in sorted(self._config.external_ranks) if not self.ranks[rank].incarnation)

    def is_owner(self, peer: bytes) -> bool:
        """Whether ``peer`` is the supervisor; whatever it says counts as a sign of life."""
        if peer != self._owner:
            self.refusals.unknown_peer += 1
            return False
        return True

    def owner_heard(self, now: float) -> None:
        """The supervisor gave a sign of life; after ``SILENCE_S`` without one it is lost."""
        self._owner_heard_at = now

    # ------------------------------------------------------------------------------------------------- hello

    def supervisor_hello(self, peer: bytes, hello: HelloSupervisor, now: float) -> list[Output]:
        """Spawn every rank that is started here; a second hello of the same supervisor changes nothing."""
        if not _same(hello.token, self._config.supervisor_token):
            self.refusals.wrong_token += 1
            return []
        if self._owner is not None:
            self.refusals.duplicate_hello += 1
            return []
        if hello.version != PROTOCOL_VERSION:
            return self._version_mismatch(-1, "the supervisor", hello.version, now)
        self._owner = peer
        self._owner_heard_at = now
        self.supervisor_pid = hello.pid
        outputs: list[Output] = []
        for record in self.ranks.values():
            if record.rank in self._config.external_ranks:
                continue
            record.token = self._new_token()
            record.progress_at = now
            outputs.append(ToOwner(peer, Spawn(record.rank, record.token)))
        return outputs

    def spawned(self, message: Spawned) -> None:
        """The supervisor says which process it started for a rank."""
        record = self.ranks.get(message.rank)
        if record is None:
            self.refusals.foreign_rank += 1
        elif record.pid == 0:
            record.pid = message.pid

    def worker_hello(self, peer: bytes, hello: HelloWorker, now: float) -> list[Output]:
        """Admit the one incarnation that holds the rank's launch token."""
        record = self.ranks.get(hello.rank)
        if record is None or not record.token or not _same(hello.token, record.token):
            self.refusals.wrong_token += 1
            return []
        if record.incarnation or record.state is RankState.DEAD or peer in self._rank_of:
            self.refusals.duplicate_hello += 1
            return []
        if hello.version != PROTOCOL_VERSION:
            return self._version_mismatch(hello.rank, f"rank {hello.rank}", hello.version, now)
        record.peer = peer
        record.incarnation = hello.incarnation
        record.pid = hello.pid
        record.host = hello.host
        record.heard_at = record.progress_at = now
        self._rank_of[peer] = record
        config = self._config
        welcome = WelcomeWorker(PROTOCOL_VERSION, config.term, config.digest, config.worker)
        outputs: list[Output] = [ToPeer(record.rank, peer, welcome)]
        group = self.groups[record.group]
        if all(self.ranks[rank].peer is not None for rank in group.ranks):
            outputs += self.epochs.begin(group.id, now)
        return outputs

    def _version_mismatch(self, rank: int, who: str, version: int, now: float) -> list[Output]:
        text = f"{who} speaks protocol version {version}, the coordinator speaks {PROTOCOL_VERSION}"
        self._evidence.final(rank, ErrorInfo(kind="protocol", text=text, rank=rank), now)
        return []

    # ------------------------------------------------------------------------------------------- what ranks say

    def accepts(self, peer: bytes, message: StepDone | CallResult) -> bool:
        """Whether ``message`` comes from the rank that it names, in its group's present (term, epoch)."""
        record = self._sender(peer, message)
        return record is not None and record.state is not RankState.DEAD

    def _sender(
        self, peer: bytes, message: StoreReady | Ready | StepDone | Fault | CallResult | BeatWorker
    ) -> RankRecord | None:
        record = self._rank_of.get(peer)
        if record is None:
            self.refusals.unknown_peer += 1
            return None
        if message.rank != record.rank:
            self.refusals.foreign_rank += 1
            return None
        if (message.term, message.epoch) != (self._config.term, self.groups[record.group].epoch):
            # Before its first Configure a rank knows no epoch, and before its Welcome no term.
            before_epoch = isinstance(message, Fault | BeatWorker) and message.epoch < 1
            if not (before_epoch and message.term <= self._config.term and record.ready is None):
                self.refusals.stale += 1
                return None
        return record

    def receive(self, peer: bytes, message: FromWorker, now: float) -> list[Output]:
        """Everything a worker says except StepDone and CallResult, which :meth:`accepts` checks for the coordinator."""
        if isinstance(message, HelloWorker):
            return self.worker_hello(peer, message, now)
        record = self._sender(peer, message)
        if record is None:
            return []
        if isinstance(message, Fault):
            # Also from a rank whose exit was told first: its own words tell more.
            record.last_fault = message.error.text
            self._evidence.fault(record.rank, record.incarnation, message, now)
            return []
        if record.state is RankState.DEAD:
            return []
        record.heard_at = now
        if isinstance(message, BeatWorker):
            return self._beat(record, message, now)
        if isinstance(message, StoreReady):
            return self.epochs.store_ready(record, message, now)
        if isinstance(message, Ready):
            return self.epochs.ready(record, message, now)
        return []

    def _beat(self, record: RankRecord, beat: BeatWorker, now: float) -> list[Output]:
        progress = (beat.step, beat.collective, beat.inside)
        loaded = (beat.load_done, beat.load_total)
        outputs: list[Output] = []
        if loaded != (record.load_done, record.load_total):
            record.load_done, record.load_total = loaded
            record.progress_at = now
            if record.state is RankState.STARTING and beat.load_total > 0:
                outputs.append(Loading(record.rank, beat.load_done, beat.load_total))
        if progress != (record.step, record.collective, record.inside):
            record.step, record.collective, record.inside = progress
            record.progress_at = now
        return outputs

    # ----------------------------------------------------------------------------------------------- ends

    def exited(self, message: Exited, now: float) -> list[Output]:
        """A worker process ended; anyone but the rank's own process is stale news."""
        record = self.ranks.get(message.rank)
        if record is None or (record.pid not in (0, message.pid)):
            self.refusals.foreign_rank += 1
            return []
        self._evidence.exited(record.incarnation, self.groups[record.group].epoch, message, now)
        self._bury(record, f"exited with {_how(message)}")
        return []

    def declare_lost(self, rank: int, error: ErrorInfo, now: float) -> None:
        """The coordinator found ``rank`` lost by its own observation (its connection is gone, a deadline passed)."""
        record = self.ranks[rank]
        if record.state is not RankState.DEAD:
            self._evidence.observed(rank, error, now)
            self._bury(record, error.text)

    def _bury(self, record: RankRecord, text: str) -> None:
        record.state = RankState.DEAD
        record.last_fault = record.last_fault or text
        record.peer = None

    # ---------------------------------------------------------------------------------------------- deadlines

    def tick(self, now: float) -> list[Output]:
        """What is due at ``now``: the loss that the evidence amounts to, and ranks that are silent or stuck."""
        if not self._evidence:
            self._check_deadlines(now)
        loss = self._evidence.verdict(now)
        if loss is None:
            return []
        if loss.rank in self.ranks:
            group = self.groups[self.ranks[loss.rank].group]
            loss = blame_silent_rank(loss, self._evidence.complainers, group, self.ranks)
            self._bury(self.ranks[loss.rank], loss.error.text)
        return [loss]

    @property
    def decides_at(self) -> float | None:
        """When :meth:`tick` wants to be called to settle a loss, None when there is none to settle."""
        return self._evidence.decides_at

    def _check_deadlines(self, now: float) -> None:
        limit = self._config.start_deadline_s
        if self._owner is None:
            if now - self._started_at > limit:
                text = f"no supervisor said hello within {limit:g} s"
                self._evidence.final(-1, ErrorInfo(kind="start_failed", text=text), now)
            return
        if now - self._owner_heard_at > SILENCE_S:
            text = f"supervisor (pid {self.supervisor_pid}) has not been heard for {SILENCE_S:g} s"
            self._evidence.final(-1, ErrorInfo(kind="engine_closed", text=text), now)
            return
        for record in self.ranks.values():
            if record.peer is not None and now - record.heard_at > SILENCE_S:
                text = f"rank {record.rank} (pid {record.pid}) has not been heard for {SILENCE_S:g} s"
                self.declare_lost(record.rank, self._error(record, text), now)
                return
        overdue = overdue_rank(self._config, self.groups, self.ranks, now)
        if overdue is not None:
            doing = waiting_for(self._config, self.groups[overdue.group], overdue)
            text = f"rank {overdue.rank} (pid {overdue.pid}) made no progress for {limit:g} s {doing}"
            self.declare_lost(overdue.rank, self._error(overdue, text), now)

    def _error(self, record: RankRecord, text: str) -> ErrorInfo:
        return ErrorInfo(
            kind="start_failed" if record.state is RankState.STARTING else "request_failed",
            text=text,
            rank=record.rank,
            incarnation=record.incarnation,
            epoch=self.groups[record.group].epoch,
        )


def _same(shown: str, token: str) -> bool:
    """Compare in a time that tells nothing of the token, whatever characters are shown."""
    return hmac.compare_digest(shown.encode(), token.encode())


def _how(message: Exited) -> str:
    return f"signal {message.signal}" if message.signal else f"code {message.code}"
