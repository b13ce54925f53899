"""A membership with a supervisor and ranks that answer at once, unless a test has them do otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np

from drumline.engine.core.decisions import Output, Tell, ToOwner, ToPeer
from drumline.engine.core.members import MembershipConfig
from drumline.engine.core.membership import Membership
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.layout import Layout
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    BeatWorker,
    Configure,
    Exited,
    Fault,
    FromWorker,
    HelloSupervisor,
    HelloWorker,
    I32Matrix,
    Kill,
    Leave,
    Left,
    Load,
    Loaded,
    Message,
    OpenStore,
    Ready,
    Shutdown,
    Spawn,
    Spawned,
    Started,
    StoreReady,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.placement import initial_placement

T = TypeVar("T")

WORKER = WorkerConfig(
    model="/m",
    dtype="float32",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=0,
    kv_cache_memory_bytes=0,
    gpu_memory_utilization=0.9,
    data_parallel_size=2,
)
SUPERVISOR = b"supervisor"
SECRET = "s3cret"
DIGEST = "d1"
NOTHING: I32Matrix = np.zeros((0, 0), dtype=np.int32)
FREE = 1 << 20


def config(layout: Layout | None = None, *, experts: int = 8, dense: bool = False, **more: object) -> MembershipConfig:
    """Two MoE layers of ``experts`` experts, one in each stage where there are two; 100 bytes a slot."""
    layout = layout or Layout(2, 1, 1, enable_expert_parallel=True)
    groups = [
        tuple(rank for dp_rank in dp_ranks for rank in layout.replica_ranks(dp_rank))
        for dp_ranks in layout.lockstep_groups(not dense)
    ]
    stages = layout.pipeline_parallel_size
    values: dict[str, object] = {
        "term": 5,
        "groups": groups,
        "worker": WORKER,
        "digest": DIGEST,
        "supervisor_token": SECRET,
        "layout": layout,
        "lockstep": not dense,
        "start_deadline_s": 60.0,
    }
    if not dense:
        values |= {
            "placements": {0: initial_placement(2, experts, layout.ep_size)},
            "num_experts": experts,
            "moe_layer_stage": tuple(layer % stages for layer in range(2)),
            "expert_slot_bytes": (100,) * stages,
        }
    return MembershipConfig(**(values | more))  # type: ignore[arg-type]


@dataclass
class Process:
    """One process of a rank. ``mute``: messages that it does not answer."""

    rank: int
    pid: int
    token: str
    alive: bool = True
    term: int = 0
    epoch: int = 0
    held: I32Matrix = field(default_factory=lambda: NOTHING)
    mute: set[type[Message]] = field(default_factory=set)
    got: list[Message] = field(default_factory=list)

    @property
    def peer(self) -> bytes:
        return b"peer-%d" % self.pid

    @property
    def incarnation(self) -> str:
        return f"inc-{self.pid}"


class FakeRanks:
    """Pumps what ``membership`` says to processes and supervisor, and what they answer back. ``out``: everything that
    it has said since the last :meth:`forget`. Processes of ranks in ``slow`` do not load until :meth:`load` says so;
    ranks do not answer messages to which they are ``deaf``."""

    def __init__(self, settings: MembershipConfig | None = None, unfinished: bool = False) -> None:
        self.config = settings or config()
        tokens = iter(f"token-{number}" for number in range(100_000))
        self.now = 0.0
        self.membership = Membership(self.config, lambda: next(tokens), now=0.0, unfinished=unfinished)
        self.processes: dict[int, Process] = {}
        self.dead: list[Process] = []
        self.slow: set[int] = set()
        # What a rank holds outside of its slots when it leaves next.
        self.spare: dict[int, I32Matrix] = {}
        self.deaf: dict[int, set[type[Message]]] = {}
        self.out: list[Output] = []
        self.killed: list[int] = []
        self.kills_work = True
        self._pid = 1000

    # ------------------------------------------------------------------------------------------------ driving

    def start(self, members: Sequence[Started] = ()) -> FakeRanks:
        self.pump(
            self.membership.supervisor_hello(SUPERVISOR, HelloSupervisor(1, SECRET, 77, tuple(members)), self.now)
        )
        return self

    def pump(self, outputs: Iterable[Output]) -> None:
        """Carry everything out, and whatever follows from it."""
        todo = list(outputs)
        while todo:
            output = todo.pop(0)
            self.out.append(output)
            if isinstance(output, ToOwner):
                todo += self._owner(output.message)
            elif isinstance(output, ToPeer):
                process = self.of_peer(output.peer)
                if process is not None and process.alive:
                    todo += self._deliver(process, output.message)

    def of_peer(self, peer: bytes) -> Process | None:
        return next((one for one in (*self.processes.values(), *self.dead) if one.peer == peer), None)

    def _owner(self, message: object) -> list[Output]:
        if isinstance(message, Spawn):
            self._pid += 1
            former = self.processes.get(message.rank)
            if former is not None:
                self.dead.append(former)
            process = Process(message.rank, self._pid, message.token, mute=self.deaf.get(message.rank, set()))
            self.processes[message.rank] = process
            self.membership.spawned(Spawned(message.rank, process.pid))
            return self.hello(process)
        if isinstance(message, Kill):
            self.killed.append(message.pid)
            if self.kills_work:
                found = next((one for one in (*self.processes.values(), *self.dead) if one.pid == message.pid), None)
                if found is not None and found.alive:
                    found.alive = False
                    return self.membership.exited(Exited(message.rank, message.pid, 0, 9), self.now)
        return []

    def hello(self, process: Process, **more: object) -> list[Output]:
        values: dict[str, object] = {
            "version": PROTOCOL_VERSION,
            "token": process.token,
            "rank": process.rank,
            "incarnation": process.incarnation,
            "pid": process.pid,
            "host": "h",
        }
        return self.membership.receive(process.peer, HelloWorker(**(values | more)), self.now)  # type: ignore[arg-type]

    def _deliver(self, process: Process, message: Message) -> list[Output]:
        process.got.append(message)
        if type(message) in process.mute:
            return []
        reply = self._reply(process, message)
        return [] if reply is None else self.membership.receive(process.peer, reply, self.now)

    def _reply(self, process: Process, message: Message) -> FromWorker | None:
        if isinstance(message, WelcomeWorker):
            process.term = message.term
        elif isinstance(message, Load):
            process.held = message.experts
            return None if process.rank in self.slow else self.loaded(process)
        elif isinstance(message, Leave):
            process.epoch = message.epoch
            spare = self.spare.pop(process.rank, process.held[:, :0])
            held = np.concatenate([process.held, spare], axis=1)
            return Left(message.term, message.epoch, process.rank, held, 9 + process.rank, FREE, spare.shape[1])
        elif isinstance(message, OpenStore):
            return StoreReady(message.term, message.epoch, process.rank, "127.0.0.1", 4242)
        elif isinstance(message, Configure):
            process.held = self._refit(process, message)
            return Ready(message.term, message.epoch, process.rank, DIGEST, 9 + process.rank, 4096, 1000, 0.5, "cpu")
        elif isinstance(message, Shutdown):
            process.alive = False
        return None

    def loaded(self, process: Process) -> Loaded:
        return Loaded(self.config.term, process.rank, DIGEST, 9 + process.rank, 4096, 1000, 0.5, "cpu", FREE)

    def _refit(self, process: Process, message: Configure) -> I32Matrix:
        members = [member.rank for member in message.members]
        layout = self.config.layout
        if process.rank not in members or not layout.enable_expert_parallel or not len(message.slots):
            return process.held
        stage = layout.coordinates(process.rank).pp_rank
        place = [rank for rank in members if layout.coordinates(rank).pp_rank == stage].index(process.rank)
        first = int(message.slots[:place].sum())
        own = message.placement[:, first : first + int(message.slots[place])].copy()
        for layer, of_stage in enumerate(self.config.moe_layer_stage):
            if of_stage != stage:
                own[layer] = -1
        return own

    # ------------------------------------------------------------------------------------------- what may happen

    def load(self, rank: int) -> None:
        """A slow process has loaded."""
        process = self.processes[rank]
        self.pump(self.membership.receive(process.peer, self.loaded(process), self.now))

    def kill(self, rank: int, signal: int = 9, code: int = 0) -> Process:
        """The process of the rank ends."""
        process = self.processes[rank]
        process.alive = False
        self.pump(self.membership.exited(Exited(rank, process.pid, code, signal, "last words"), self.now))
        return process

    def fault(self, rank: int, kind: str = "internal", text: str = "broken", epoch: int = -1, **more: object) -> None:
        """A rank reports a fault, of the epoch that it is in."""
        process = self.processes[rank]
        error = msgspec.structs.replace(ErrorInfo(kind=kind, text=text), **more)
        fault = Fault(self.config.term, process.epoch if epoch < 0 else epoch, rank, error)
        self.pump(self.membership.receive(process.peer, fault, self.now))

    def say(self, rank: int, message: FromWorker) -> list[Output]:
        return self.membership.receive(self.processes[rank].peer, message, self.now)

    def steps(self, rank: int, count: int) -> None:
        for step in range(count):
            self.membership.step_done(rank, step)

    def beat(self, *ranks: int) -> None:
        """These ranks, or all that live, and the supervisor give a sign of life."""
        self.membership.owner_heard(self.now)
        for rank in ranks or tuple(self.processes):
            process = self.processes[rank]
            if process.alive:
                self.pump(self.say(rank, BeatWorker(process.term, process.epoch, rank, 0, 0, False)))

    def wait(self, seconds: float, beating: Iterable[int] | None = None) -> None:
        """Time passes; who beats does so every half second; what is due is done when it is due."""
        end = self.now + seconds
        while self.now < end:
            due = self.membership.due_at
            self.now = min(end, self.now + 0.5, max(due, self.now) if due is not None else end)
            if due is not None and self.now >= due:
                self.pump(self.membership.tick(self.now))
            if beating is None:
                self.beat()
            else:
                self.membership.owner_heard(self.now)
                self.beat(*[rank for rank in beating if rank in self.processes])

    # ---------------------------------------------------------------------------------------------- what was said

    def forget(self) -> None:
        self.out.clear()

    def said(self, kind: type[T]) -> list[T]:
        """The outputs of one kind, and messages to ranks or the supervisor."""
        found = [output for output in self.out if isinstance(output, kind)]
        inner = [one.message for one in self.out if isinstance(one, ToPeer | ToOwner)]
        return found + [message for message in inner if isinstance(message, kind)]

    def events(self, kind: str) -> list[str]:
        return [one.event.text for one in self.said(Tell) if one.event.kind == kind]
