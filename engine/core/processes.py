"""The processes of ranks: who is to be started, killed, and told that its place is taken; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from drumline.engine.core.decisions import Output, Tell, ToOwner, ToPeer
from drumline.engine.core.members import MembershipConfig, RankRecord, RankState, Refusals
from drumline.protocol.messages import Event, Kill, Shutdown, Spawn, Spawned, Started

MAX_FENCED = 4096


class Processes:
    """``owner`` is the socket identity of the supervisor, once it has said hello."""

    def __init__(
        self,
        config: MembershipConfig,
        ranks: Mapping[int, RankRecord],
        new_token: Callable[[], str],
        refusals: Refusals,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._new_token = new_token
        self._refusals = refusals
        self.owner: bytes | None = None
        self.rank_of: dict[bytes, RankRecord] = {}
        self._fenced: dict[bytes, tuple[str, bool]] = {}

    def is_external(self, rank: int) -> bool:
        """Whether somebody else starts the rank."""
        return rank in self._config.external_ranks

    # -------------------------------------------------------------------------------------------------------- starts

    def spawn(self, record: RankRecord, now: float) -> list[Output]:
        """Start a process for the rank, of which no other may live."""
        if self.owner is None:
            record.start_at = now
            return []
        record.token = self._new_token()
        record.state = RankState.STARTING
        record.incarnation = ""
        record.pid = 0
        record.forget(now)
        record.start_at = None
        record.crash_looping = False
        record.unconfirmed += 1
        return [ToOwner(self.owner, Spawn(record.rank, record.token))]

    def restart(self, record: RankRecord, now: float) -> list[Output]:
        """Start a process in place of one that was lost."""
        if self.owner is None:
            return []
        record.log.started(now)
        record.restarts += 1
        outputs = self.spawn(record, now)
        text = f"a process is started for rank {record.rank}, in place of one that was lost: {record.last_fault}"
        return [*outputs, Tell(Event("respawn", text, record.rank, group=record.group, total=record.restarts))]

    def replace(self, record: RankRecord, now: float) -> list[Output]:
        """See to it that another process takes the place of a lost one, at once if it may be."""
        if self.is_external(record.rank):
            record.token = self._config.launch_token
            return []
        at = record.log.next_start(now)
        if at is not None:
            record.start_at = at
            return self.due(now) if at <= now else []
        record.crash_looping = True
        record.start_at = record.log.allowed_at(now)
        limit = self._config.restart_limit
        why = f"after {limit} restarts within 10 minutes" if limit else "restart_limit is 0 and"
        when = " for now" if record.start_at is not None else ""
        text = f"rank {record.rank} is not started again{when}: {why} it was lost: {record.last_fault}"
        return [Tell(Event("crash_loop", text, record.rank, group=record.group, total=record.restarts))]

    def due(self, now: float) -> list[Output]:
        """Start what is to be started by now."""
        outputs: list[Output] = []
        for record in self._ranks.values():
            if record.start_at is not None and now >= record.start_at:
                outputs += self.restart(record, now)
        return outputs

    def adopt(self, started: Started, now: float) -> bool:
        """A process that lives from before this coordinator. Whether there is such a rank here."""
        record = self._ranks.get(started.rank)
        if record is None or self.is_external(started.rank):
            self._refusals.foreign_rank += 1
            return False
        record.token = started.token
        record.pid = started.pid
        record.progress_at = now
        return True

    def spawned(self, message: Spawned) -> list[Output]:
        """The supervisor says which process it started for a rank."""
        record = self._ranks.get(message.rank)
        if record is None:
            self._refusals.foreign_rank += 1
            return []
        overtaken = record.unconfirmed > 1
        record.unconfirmed = max(record.unconfirmed - 1, 0)
        if overtaken:
            # Another was ordered before this one was told of.
            record.lost_pids.add(message.pid)
            return self.kill(message.rank, message.pid)
        if record.pid == 0:
            record.pid = message.pid
        return []

    # ---------------------------------------------------------------------------------------------------------- ends

    def kill(self, rank: int, pid: int) -> list[Output]:
        """Have the process killed, where this engine started it."""
        if self.owner is None or pid == 0 or self.is_external(rank):
            return []
        return [ToOwner(self.owner, Kill(rank, pid))]

    def bury(self, record: RankRecord, state: RankState, text: str) -> None:
        """The rank's process is lost: it is fenced, and what it had is gone."""
        record.state = state
        record.last_fault = text
        if record.peer is not None:
            self.rank_of.pop(record.peer, None)
            reason = f"the place of rank {record.rank} (incarnation {record.incarnation}) is taken: {text}"
            self._fence(record.peer, reason)
        record.peer = None
        if record.pid:
            record.lost_pids.add(record.pid)
        record.has_weights = False
        record.loaded = record.left = None
        record.leased = False

    @property
    def former(self) -> tuple[bytes, ...]:
        """The socket identities of processes that were a rank: they may live on."""
        return tuple(self._fenced)

    def _fence(self, peer: bytes, reason: str) -> None:
        self._fenced[peer] = (reason, False)
        while len(self._fenced) > MAX_FENCED:
            del self._fenced[next(iter(self._fenced))]

    def fenced(self, peer: bytes) -> list[Output] | None:
        """What to say to a process that is no longer the rank's, None to any other."""
        found = self._fenced.get(peer)
        if found is None:
            return None
        self._refusals.fenced += 1
        reason, told = found
        if told:
            return []
        self._fenced[peer] = (reason, True)
        return [ToPeer(-1, peer, Shutdown(self._config.term, reason))]

    def refuse(self, peer: bytes, rank: int, reason: str) -> list[Output]:
        """Tell a process that it is not admitted."""
        return [ToPeer(-1, peer, Shutdown(self._config.term, f"rank {rank} is not admitted: {reason}"))]
