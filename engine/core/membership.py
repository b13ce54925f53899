"""Who belongs to the engine: messages in, messages out, with deadlines; no I/O.

Each rank for itself: its process is spawned with a launch token drawn for it alone, or is started by somebody else who
was given the token of all such ranks; its Hello is checked (token, version, incarnation) and welcomed; it loads, and is
parked until an epoch of its group takes it in, which :mod:`~drumline.engine.core.epochs` sees to. A rank that is lost
is replaced, and its group forms the next epoch with those that are there (:mod:`~drumline.engine.core.losses`). Every
message that is waited for has a deadline; who misses it is lost.

Identity is (rank, incarnation). A launch token admits one incarnation of a rank: a second Hello is refused and counted,
as is everything from a peer that has not said Hello, that speaks for another rank, or that belongs to an older
(term, epoch). A process whose place is taken is told so once.
"""

from __future__ import annotations

from collections.abc import Callable

from drumline.engine.core.deadlines import Deadlines
from drumline.engine.core.decisions import Ended, EpochReady, Output
from drumline.engine.core.epochs import Epochs
from drumline.engine.core.first_start import FirstStart
from drumline.engine.core.hellos import Hellos, same
from drumline.engine.core.losses import Losses
from drumline.engine.core.members import (
    GroupRecord,
    GroupStage,
    MembershipConfig,
    RankRecord,
    Refusals,
)
from drumline.engine.core.processes import Processes
from drumline.engine.core.rank_messages import RankMessages, injected
from drumline.engine.core.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, PROVEN_STEPS, Restarts
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    CallResult,
    Exited,
    FromWorker,
    HelloSupervisor,
    HelloWorker,
    Injected,
    Spawned,
    Staged,
    StepDone,
)

GATHER_S = 2.0
"""How long who takes over waits for ranks that lived already, before it goes on with those that are there."""


class Membership:
    """The ranks of an engine and their life. ``new_token`` draws an unguessable launch token. ``unfinished``: requests
    of an earlier coordinator wait, so that a start is not given up for what may be better at the next try."""

    def __init__(
        self, config: MembershipConfig, new_token: Callable[[], str], now: float, unfinished: bool = False
    ) -> None:
        self._config = config
        self._now = now
        self._ended = False
        self._pending: list[Output] = []
        self.supervisor_pid = 0
        self.groups = [GroupRecord(number, tuple(ranks)) for number, ranks in enumerate(config.groups)]
        # Who dies on order, again and again, is no rank in a crash loop.
        longest_pause_s = FIRST_PAUSE_S if config.worker.fault_injection else LONGEST_PAUSE_S
        self.ranks = {
            rank: RankRecord(
                rank,
                group.id,
                log=Restarts(config.restart_limit, longest_pause_s=longest_pause_s),
                progress_at=now,
            )
            for group in self.groups
            for rank in group.ranks
        }
        for rank in config.external_ranks:
            self.ranks[rank].token = config.launch_token
        self.refusals = Refusals()
        self._processes = Processes(config, self.ranks, new_token, self.refusals)
        self._hellos = Hellos(config, self.groups, self.ranks, self._processes, self.refusals, self._misfit)
        self.epochs = Epochs(config, self.groups, self.ranks, self.refusals, self._may_begin)
        self.epochs.starting = not unfinished
        self._losses = Losses(self.groups, self.ranks, self.epochs, self._processes)
        self._first = FirstStart(over=unfinished)
        self._heard = RankMessages(config, self.groups, self.refusals, self.epochs, self._losses, self._first)
        self._deadlines = Deadlines(config, self.groups, self.ranks, self._processes, self.refusals, now)

    # ------------------------------------------------------------------------------------------------ who there is

    @property
    def all_ready(self) -> bool:
        """Whether the epoch of every group is open."""
        return all(group.is_open for group in self.groups)

    @property
    def took_over(self) -> bool:
        """Whether ranks were found that had lived under another coordinator."""
        return self._hellos.took_over

    @property
    def owner(self) -> bytes | None:
        """The socket identity of the supervisor, once it has said hello."""
        return self._processes.owner

    @property
    def peers(self) -> tuple[bytes, ...]:
        """The socket identities of all processes that are a rank, or were one: those may live on."""
        return (*self._processes.rank_of, *self._processes.former)

    @property
    def awaited(self) -> tuple[int, ...]:
        """The ranks that somebody else starts and of which no process is there, ascending."""
        return tuple(rank for rank in sorted(self._config.external_ranks) if self.ranks[rank].peer is None)

    @property
    def waiting_for(self) -> str:
        """What requests wait for while groups gather; empty while all compute."""
        texts = [self._waits_for(group) for group in self.groups if group.stage is GroupStage.GATHERING]
        return "; ".join(texts)

    def _waits_for(self, group: GroupRecord) -> str:
        missing = [self.ranks[rank] for rank in group.ranks if not self.ranks[rank].usable]
        ranks = ", ".join(f"rank {one.rank} ({'not started' if one.lost else 'starting'})" for one in missing)
        why = f": {group.waiting_for}" if group.waiting_for else ""
        return f"group {group.id} waits for {ranks or 'its ranks'}{why}"

    def rank_of_peer(self, peer: bytes) -> int:
        """The rank whose process has this socket identity, -1 for none."""
        record = self._processes.rank_of.get(peer)
        return record.rank if record is not None else -1

    def is_owner(self, peer: bytes) -> bool:
        """Whether ``peer`` is the supervisor."""
        if peer != self._processes.owner:
            self.refusals.unknown_peer += 1
            return False
        return True

    def owner_heard(self, now: float) -> None:
        """The supervisor gave a sign of life."""
        self._deadlines.owner_heard_at = now

    # ------------------------------------------------------------------------------------------------- hello

    def supervisor_hello(self, peer: bytes, hello: HelloSupervisor, now: float) -> list[Output]:
        """Spawn every rank that is started here and does not live yet; a second hello changes nothing."""
        if not same(hello.token, self._config.supervisor_token):
            self.refusals.wrong_token += 1
            return []
        if self._processes.owner is not None:
            self.refusals.duplicate_hello += 1
            return []
        if hello.version != PROTOCOL_VERSION:
            text = f"the supervisor speaks protocol version {hello.version}, the coordinator {PROTOCOL_VERSION}"
            return self._said(self._first.fails(ErrorInfo(kind="protocol", text=text)), now)
        self.owner_heard(now)
        self._deadlines.gathers_until = now + GATHER_S
        self.supervisor_pid = hello.pid
        outputs = self._hellos.supervisor(peer, hello, now)
        for group in self.groups:
            outputs += self.epochs.consider(group, now)
        return self._said(outputs, now)

    def spawned(self, message: Spawned) -> None:
        """The supervisor says which process it started for a rank."""
        self._pending += self._processes.spawned(message)

    def worker_hello(self, peer: bytes, hello: HelloWorker, now: float) -> list[Output]:
        """Admit the one incarnation that holds the rank's launch token."""
        outputs = self._hellos.worker(peer, hello, now)
        record = self._processes.rank_of.get(peer)
        if record is not None and record.has_weights:
            outputs += self.epochs.consider(self.groups[record.group], now)
        return self._said(outputs, now)

    def _misfit(self, record: RankRecord, error: ErrorInfo, now: float) -> list[Output]:
        """A process that was built or configured otherwise. One that was so from the start ends the start."""
        if not self._first.over and not record.has_weights and not self.took_over:
            return self._first.fails(error)
        return self._losses.lose([record], "protocol", [error], now)

    def _may_begin(self, group: GroupRecord) -> bool:
        """Whether the group may form an epoch though it is not whole."""
        if group.opened:
            return True
        if not self.took_over:
            return self._first.over and not any(
                self.ranks[rank].coming and rank not in self._config.external_ranks for rank in group.ranks
            )
        lived = self._hellos.adopted | self._config.external_ranks
        awaited = any(not self.ranks[rank].usable for rank in group.ranks if rank in lived)
        return not awaited or self._now >= self._deadlines.gathers_until

    # ------------------------------------------------------------------------------------------- what ranks say

    def accepts(self, peer: bytes, message: StepDone | CallResult | Staged) -> bool:
        """Whether ``message`` comes from the rank that it names, in its group's present (term, epoch)."""
        record = self._sender(peer, message.rank)
        return record is not None and self._heard.current(record, message)

    def _sender(self, peer: bytes, rank: int) -> RankRecord | None:
        record = self._processes.rank_of.get(peer)
        if record is None:
            fenced = self._processes.fenced(peer)
            if fenced is None:
                self.refusals.unknown_peer += 1
            self._pending += fenced or ()
        elif rank != record.rank:
            self.refusals.foreign_rank += 1
        else:
            return record
        return None

    def receive(self, peer: bytes, message: FromWorker, now: float) -> list[Output]:
        """Everything a worker says except what :meth:`accepts` checks for the coordinator."""
        self._now = now
        if isinstance(message, HelloWorker):
            return self.worker_hello(peer, message, now)
        record = self._sender(peer, message.rank)
        if record is None:
            if isinstance(message, Injected) and peer in self._processes.former:
                return self._said(injected(message), now)
            return self._said([], now)
        record.heard_at = now
        return self._said(self._heard.hear(record, message, now), now)

    def step_done(self, rank: int, step: int) -> None:
        """``rank`` has replied to ``step``."""
        record = self.ranks[rank]
        record.replied = step
        record.executed += 1
        if record.executed == PROVEN_STEPS:
            record.log.proved()

    def drained(self, group: int, now: float) -> list[Output]:
        """No step of the group is in flight: the epoch that is planned may begin."""
        return self._said(self.epochs.drained(self.groups[group], now), now)

    # ----------------------------------------------------------------------------------------------- ends

    def exited(self, message: Exited, now: float) -> list[Output]:
        """A worker process ended; anyone but the rank's own process is stale news."""
        record = self.ranks.get(message.rank)
        if record is None or (record.pid not in (0, message.pid) and message.pid not in record.lost_pids):
            self.refusals.foreign_rank += 1
            return []
        if message.pid not in record.lost_pids and self._first.exited(record, message, now):
            return self._said([], now)
        return self._said(self._losses.exited(record, message, now), now)

    def declare_lost(self, rank: int, kind: str, error: ErrorInfo, now: float) -> list[Output]:
        """The coordinator found ``rank`` lost by its own observation. ``kind``: unreachable, wedged or protocol."""
        record = self.ranks[rank]
        if record.lost:
            return []
        return self._said(self._losses.lose([record], kind, [error], now), now)

    def forgive(self, rank: int, now: float) -> None:
        """The rank is not to blame for its end: another process need not wait."""
        record = self.ranks[rank]
        record.log.forgive()
        if record.start_at is not None:
            record.crash_looping = False
            record.start_at = now
            self._now = now

    # ---------------------------------------------------------------------------------------------- deadlines

    @property
    def due_at(self) -> float | None:
        """When :meth:`tick` wants to be called, None: not before something has happened."""
        if self._ended:
            return None
        moments = [self._deadlines.due_at, self._losses.due_at, self._first.due_at]
        if self._pending:
            moments.append(self._now)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self, now: float) -> list[Output]:
        """What is due at ``now``: processes to start, ranks that are silent or stuck, epochs that do not form."""
        self._now = now
        outputs = self._first.tick(now) + self._losses.tick(now) + self._processes.due(now)
        failed = self._deadlines.failed(now)
        if failed is not None:
            return self._said([*outputs, Ended(failed.text, failed)], now)
        for overdue in self._deadlines.overdue(now):
            if overdue.of_start and not self._first.over:
                outputs += self._first.fails(overdue.errors[0])
            else:
                outputs += self._losses.lose(overdue.records, overdue.kind, overdue.errors, now)
        if self._deadlines.gathered(now):
            for group in self.groups:
                outputs += self.epochs.consider(group, now)
        return self._said(outputs + self._losses.hopeless(), now)

    def _said(self, outputs: list[Output], now: float) -> list[Output]:
        """``outputs``, after what has gathered; nothing once the engine has ended."""
        self._now = now
        if self._ended:
            return []
        outputs, self._pending = self._pending + outputs, []
        self._first.over = self._first.over or self.took_over
        for output in outputs:
            if isinstance(output, Ended):
                self._ended = True
            elif isinstance(output, EpochReady) and self.all_opened:
                self._first.over = True
        self.epochs.starting = self._deadlines.starting = not self._first.over
        return outputs

    @property
    def all_opened(self) -> bool:
        """Whether every group has computed."""
        return all(group.opened for group in self.groups)
