"""All parts of one simulated engine, and its day from the start to rest."""

from __future__ import annotations

from drumline.protocol.messages import Configure
from tests.simulation.cluster.clients import SimClient
from tests.simulation.cluster.clock import Clock
from tests.simulation.cluster.disk import Disk
from tests.simulation.cluster.epoch_run import EpochRun
from tests.simulation.cluster.expert_load import Skew
from tests.simulation.cluster.faults import Faults
from tests.simulation.cluster.host import Host
from tests.simulation.cluster.hub import Hub
from tests.simulation.cluster.rank import SimRank
from tests.simulation.cluster.rules import Rules
from tests.simulation.cluster.shape import RESUME_WINDOW_S, Shape
from tests.simulation.cluster.supervisor import SimSupervisor
from tests.simulation.worker import NOTHING_WRITTEN, RuleBrokenError

ZOMBIES_S = 60.0
"""A stopped process goes on, and an order to kill arrives, within this time."""
MAX_EVENTS = 60_000
EVENTS_BETWEEN_LOOKS = 8
PATIENCE_S = 900.0
"""So long after the last fault everything must have ended."""


class Cluster:
    """One engine. ``term`` is that of its newest coordinator, ``crash_loop``: a rank ends again and again;
    ``may_end``: and so may the engine. ``stuck``: by rank, until when no expert gets through from or to it."""

    def __init__(self, shape: Shape, seed: int, clients: int, verbose: bool = False) -> None:
        self.shape = shape
        self.seed = seed
        self.clock = Clock(seed, verbose)
        self.faults = Faults(self.clock, self.kill_coordinator)
        self.rules = Rules(self)
        self.skew = Skew(seed, len(shape.moe_layer_stage), shape.num_experts)
        self.hub = Hub(self)
        self.disk = Disk()
        self.supervisor = SimSupervisor(self)
        self.term = 0
        self.term_since = 0.0
        self.may_end = self.crash_loop = False
        self.engine_ended = False
        self.was_degraded = False
        self.failure: Exception | None = None
        self.stuck: dict[int, float] = {}
        self._tokens = 0
        self._ports = 9000
        self._stores: dict[int, tuple[int, int, str]] = {}
        self._runs: dict[tuple[int, int, int], EpochRun] = {}
        self._kv: dict[tuple[str, ...], list[int]] = {}
        self.clients = [SimClient(self, number) for number in range(clients)]

    def start(self) -> None:
        """The supervisor starts the coordinator, and clients come."""
        self.start_coordinator()
        for client in self.clients:
            self.clock.soon(0.1, client.connect)

    def start_coordinator(self) -> None:
        """The next coordinator, of a higher term."""
        if self.hub.host is not None or self.engine_ended:
            return
        self.term += 1
        self.term_since = self.clock.now
        self.clock.seen["terms"] += 1
        self.clock.note(f"the coordinator of term {self.term} starts")
        self.hub.listen(Host(self, self.term))

    def kill_coordinator(self) -> None:
        """SIGKILL."""
        if self.hub.host is not None:
            self.clock.seen["fault_coordinator"] += 1
            self.hub.host.kill()

    def kill_everything(self) -> None:
        """The supervisor dies, and all that it owns; somebody starts it again."""
        if self.engine_ended:
            return
        self.clock.seen["fault_everything"] += 1
        host, supervisor = self.hub.host, self.supervisor
        supervisor.stop_all()
        if host is not None:
            host.kill()
        self.supervisor = SimSupervisor(self, supervisor.pids)
        self.clock.after(1.0, self.start_coordinator)

    def new_token(self) -> str:
        """A launch token."""
        self._tokens += 1
        return f"token-{self._tokens}"

    # -------------------------------------------------------------------- epochs

    def lives(self, rank: int, incarnation: str) -> bool:
        """Whether this very process of ``rank`` is there."""
        return any(
            process.rank == rank and process.incarnation == incarnation
            for process in self.supervisor.processes.values()
        )

    def open_store(self, process: SimRank, epoch: tuple[int, int]) -> int:
        """``process`` opens the store of an epoch. Returns its port."""
        self._ports += 1
        self._stores[self._ports] = (*epoch, process.incarnation)
        return self._ports

    def enter(self, process: SimRank, configure: Configure) -> EpochRun:
        """``process`` comes to the epoch that it was configured for."""
        group = next(i for i, ranks in enumerate(self.shape.groups) if process.rank in ranks)
        key = (group, configure.term, configure.epoch)
        run = self._runs.get(key)
        if run is None:
            self._check_store(configure)
            run = self._runs[key] = EpochRun(self, group, configure)
        process.run = run
        run.enter(process, configure)
        return run

    def _check_store(self, configure: Configure) -> None:
        if not configure.store_port:
            return
        opened = self._stores.get(configure.store_port)
        if opened is None or opened[:2] != (configure.term, configure.epoch):
            raise RuleBrokenError(f"epoch {configure.epoch} is to meet at the store of {opened}")

    def kv_of(self, incarnations: tuple[str, ...]) -> list[int]:
        """The KV cache of the replica that is made of these processes."""
        slots = self._kv.get(incarnations)
        if slots is None:
            count = self.shape.num_blocks * self.shape.core.block_size
            slots = self._kv[incarnations] = [NOTHING_WRITTEN] * count
        return slots

    def hit(self, seeds: list[int]) -> None:
        """The logits of the requests with these seeds were not finite."""
        self.clock.seen["numeric"] += 1
        self.rules.hit(seeds)

    def is_full(self, identity: bytes) -> bool:
        """Whether the socket of this client has no room."""
        line = self.hub.lines.get(identity)
        return any(client.line is line and client.is_full for client in self.clients)

    # -------------------------------------------------------------------- the day

    def run(self, last_fault: float) -> None:
        """Until everything has ended and come to rest. Raises :class:`RuleBrokenError` when it does not."""
        while self.clock.now < last_fault or not self.over:
            for _ in range(EVENTS_BETWEEN_LOOKS):
                self._step()
            if self.clock.now > last_fault + PATIENCE_S:
                raise RuleBrokenError(f"not over after {PATIENCE_S:g} s: {self.unfinished()}")
        if self.engine_ended:
            return
        self.faults.disarm()
        self._go_on(1.0)
        if self.rules.rest.zombies:
            self._go_on(ZOMBIES_S)
        if self.rules.rest.remembered:
            self._go_on(RESUME_WINDOW_S + 5.0)
        self.rules.rest.check()

    def _go_on(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self._step()

    def _step(self) -> None:
        self.clock.step()
        if self.failure is not None:
            raise self.failure
        if self.clock.handled > MAX_EVENTS:
            raise RuleBrokenError(f"no end after {MAX_EVENTS} events: {self.unfinished()}")

    @property
    def over(self) -> bool:
        """Whether every request has ended and every rank that may serve does."""
        if self.engine_ended:
            return True
        return all(asked.over for client in self.clients for asked in client.asked.values()) and self.rules.rest.whole

    def unfinished(self) -> str:
        """What has not ended, for a failure's text."""
        waiting = [
            f"{asked.request_id} {'/'.join(str(len(stream.tokens)) for stream in asked.streams)}"
            for client in self.clients
            for asked in client.asked.values()
            if not asked.over
        ]
        return f"requests {waiting}; {self.rules.rest.standing()}"
