"""Who is admitted: the supervisor, and one process of each rank that shows the launch token of its rank; no I/O."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence

from drumline.engine.core.decisions import Output, ToPeer
from drumline.engine.core.members import GroupRecord, GroupStage, MembershipConfig, RankRecord, RankState, Refusals
from drumline.engine.core.processes import Processes
from drumline.engine.core.refit import initial_experts
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import PROTOCOL_VERSION, HelloSupervisor, HelloWorker, Load, WelcomeWorker

MAX_EARLY = 1024


def same(shown: str, token: str) -> bool:
    """Compare in a time that tells nothing of the token, whatever characters are shown."""
    return hmac.compare_digest(shown.encode(), token.encode())


class Hellos:
    """``took_over``: processes of an earlier coordinator were found. ``misfit(record, error, now)`` says what becomes
    of a process that cannot be used."""

    def __init__(
        self,
        config: MembershipConfig,
        groups: Sequence[GroupRecord],
        ranks: Mapping[int, RankRecord],
        processes: Processes,
        refusals: Refusals,
        misfit: Callable[[RankRecord, ErrorInfo, float], list[Output]],
    ) -> None:
        self._config = config
        self._groups = groups
        self._ranks = ranks
        self._processes = processes
        self._refusals = refusals
        self._misfit = misfit
        self._early: dict[bytes, HelloWorker] = {}
        self.took_over = False
        self.adopted: set[int] = set()

    def supervisor(self, peer: bytes, hello: HelloSupervisor, now: float) -> list[Output]:
        """Spawn every rank that is started here and of which no process lives. The hello is the supervisor's first."""
        processes = self._processes
        processes.owner = peer
        for started in hello.members:
            if processes.adopt(started, now):
                self.adopted.add(started.rank)
                self.took_over = True
        outputs: list[Output] = []
        for record in self._ranks.values():
            if record.rank not in self.adopted and not processes.is_external(record.rank):
                outputs += processes.spawn(record, now)
        early, self._early = self._early, {}
        for whose, one in early.items():
            outputs += self.worker(whose, one, now)
        return outputs

    def worker(self, peer: bytes, hello: HelloWorker, now: float) -> list[Output]:
        """Admit the one incarnation that holds the rank's launch token; tell any other why it is not admitted."""
        record = self._ranks.get(hello.rank)
        if record is None:
            return self._refused(peer, hello, f"the world has ranks 0 to {max(self._ranks)}")
        external = self._processes.is_external(hello.rank)
        if not external and self._processes.owner is None and len(self._early) < MAX_EARLY:
            # The supervisor knows with which token it was started, and has not said so yet.
            self._early[peer] = hello
            return []
        if not record.token or not same(hello.token, record.token):
            return self._refused(peer, hello, self._why_not(external))
        if record.peer == peer or (record.incarnation == hello.incarnation and not record.lost):
            self._refusals.duplicate_hello += 1
            return []
        if peer in self._processes.rank_of or record.peer is not None or (record.lost and not external):
            self._refusals.duplicate_hello += 1
            reason = f"it is there already, as process {record.pid} on {record.host or 'its host'}"
            return self._processes.refuse(peer, hello.rank, reason)
        if hello.term > self._config.term:
            self._refusals.stale += 1
            return []
        return self._admit(record, peer, hello, now)

    def _why_not(self, external: bool) -> str:
        if external:
            return "it shows a wrong launch token"
        return "it shows a wrong launch token, and the engine starts that rank itself"

    def _refused(self, peer: bytes, hello: HelloWorker, reason: str) -> list[Output]:
        self._refusals.wrong_token += 1
        return self._processes.refuse(peer, hello.rank, reason)

    def _admit(self, record: RankRecord, peer: bytes, hello: HelloWorker, now: float) -> list[Output]:
        if record.lost:
            record.restarts += 1
        record.state = RankState.STARTING
        record.peer = peer
        record.incarnation = hello.incarnation
        record.pid = hello.pid
        record.host = hello.host
        record.forget(now)
        record.heard_at = now
        self._processes.rank_of[peer] = record
        if hello.version != PROTOCOL_VERSION:
            text = f"rank {hello.rank} speaks protocol version {hello.version}, the coordinator {PROTOCOL_VERSION}"
            return self._misfit(record, ErrorInfo(kind="protocol", text=text, rank=hello.rank), now)
        config = self._config
        if hello.loaded and hello.digest != config.digest:
            text = (
                f"rank {hello.rank} has loaded for config digest {hello.digest}, the coordinator's is {config.digest}"
            )
            return self._misfit(record, ErrorInfo(kind="protocol", text=text, rank=hello.rank), now)
        group = self._groups[record.group]
        if not group.opened and group.stage is GroupStage.GATHERING:
            # Epochs number on, so that no two terms have one in common.
            group.epoch = max(group.epoch, hello.epoch)
        welcome = WelcomeWorker(PROTOCOL_VERSION, config.term, config.digest, config.worker)
        if hello.loaded:
            self.took_over = True
            record.has_weights = True
            record.state = RankState.PARKED
            return [ToPeer(record.rank, peer, welcome)]
        load = Load(config.term, initial_experts(config, group.id, record.rank), record.num_blocks)
        return [ToPeer(record.rank, peer, welcome), ToPeer(record.rank, peer, load)]
