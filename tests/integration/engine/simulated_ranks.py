"""A coordinator in the test's own loop, with real sockets, and with ranks whose next token is a hash of the prefix."""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq

from drumline.engine.config import EngineConfig
from drumline.engine.coordinator import Coordinator
from drumline.engine.launch.order import Order
from drumline.engine.resolve import resolve
from drumline.protocol.codec import Codec, config_digest
from drumline.protocol.errors import EngineClosed, ErrorInfo
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Beat,
    BeatWorker,
    Call,
    CallResult,
    CancelStage,
    Configure,
    Event,
    Exited,
    Failed,
    HelloClient,
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
    SamplingSpec,
    Shutdown,
    Spawn,
    StageExperts,
    StatusQuery,
    StatusReport,
    Step,
    StepDone,
    StoreReady,
    Submit,
    ToClient,
    ToSupervisor,
    ToWorker,
    WelcomeClient,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.sockets import Dealer
from drumline.protocol.status import EngineStatus
from tests.integration.engine.simulated_experts import SimulatedExperts
from tests.simulation.worker import SimWorker

T = TypeVar("T")
NUM_BLOCKS = 256
PROMPT = tuple(range(5, 12))
SEED = 3
TOKEN = "the supervisor's"
PATIENCE_S = 10.0
_PIDS = itertools.count(1000)
FREE = 1 << 30
NOTHING_HELD: I32Matrix = np.zeros((0, 0), dtype=np.int32)


class SimulatedRank:
    """Speaks a worker's side of the protocol: the reporting rank of a replica answers with tokens, the others
    acknowledge. What it has computed it keeps from one epoch to the next. ``answer`` may be replaced to misbehave.
    ``steps`` counts those it has run, ``sampled`` the tokens it has answered with."""

    def __init__(self, engine: SimulatedEngine, rank: int, token: str) -> None:
        self.engine = engine
        self.rank = rank
        self.incarnation = f"inc-{rank}-{uuid.uuid4().hex[:8]}"
        self.dealer: Dealer[ToWorker] = Dealer(engine.context, engine.order.worker_endpoint, Codec(ToWorker))
        self.config: WorkerConfig | None = None
        self.worker: SimWorker | None = None
        self.held = NOTHING_HELD
        self.experts: SimulatedExperts | None = None
        self.answer: Callable[[StepDone], StepDone | None] = lambda done: done
        self.answers_calls = True
        self.steps = self.sampled = 0
        self.shut_down = False
        self.pid = next(_PIDS)
        self.dealer.send(HelloWorker(PROTOCOL_VERSION, token, rank, self.incarnation, self.pid, "h"))
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self.shut_down:
            try:
                message = await self.dealer.recv()
            except EngineClosed:
                return
            reply = self._reply(message)
            if reply is not None:
                self.dealer.send(reply)

    def _reply(self, message: ToWorker) -> Message | None:
        if isinstance(message, WelcomeWorker):
            self.config = message.config
        elif isinstance(message, Load):
            return self._load(message)
        elif isinstance(message, Leave):
            if self.experts is not None:
                self.held = self.experts.held
            return Left(message.term, message.epoch, self.rank, self.held, self.engine.num_blocks(self.rank), FREE)
        elif isinstance(message, OpenStore):
            return StoreReady(message.term, message.epoch, self.rank, "127.0.0.1", 1)
        elif isinstance(message, Configure):
            return self._configure(message)
        elif isinstance(message, Step) and self.worker is not None:
            return self._step(self.worker, message)
        elif isinstance(message, StageExperts | CancelStage) and self.experts is not None:
            return self.experts.told(message)
        elif isinstance(message, Call) and self.answers_calls:
            return CallResult(message.term, message.epoch, message.call_id, self.rank, True, b"pong")
        elif isinstance(message, Shutdown):
            self.shut_down = True
        return None

    def _step(self, worker: SimWorker, message: Step) -> StepDone | None:
        self.steps += 1
        experts = self.experts
        held = experts.held.copy() if experts is not None else NOTHING_HELD
        staged = experts.before(message) if experts is not None else None
        if staged is not None:
            self.dealer.send(staged)
        done = worker.execute(message)
        if experts is not None:
            done = experts.after(message, done, held)
        layout = self.engine.coordinator.resolved.layout
        if self.rank != layout.reporting_rank(layout.replica_of(self.rank)):
            nothing = np.zeros(0, dtype=np.int32)
            done = msgspec.structs.replace(done, tokens=nothing, logprob_index=nothing, logprobs=())
        self.sampled += len(done.tokens)
        return self.answer(done)

    def _load(self, message: Load) -> Message:
        assert self.config is not None
        self.held = message.experts
        blocks = self.engine.num_blocks(self.rank)
        return Loaded(message.term, self.rank, config_digest(self.config), blocks, 4096, 1000, 0.1, "cpu", FREE)

    def _configure(self, message: Configure) -> Message:
        assert self.config is not None
        resolved = self.engine.coordinator.resolved
        layout = resolved.layout
        replica = layout.replica_of(self.rank)
        computing = sorted({layout.replica_of(member.rank) for member in message.members})
        place = computing.index(replica) if replica in computing else -1
        blocks = self.engine.num_blocks(self.rank)
        before = self.worker
        self.worker = SimWorker(resolved.core, self.rank, place, blocks, message.term, message.epoch)
        if before is not None:
            self.worker.slots = before.slots
        self.held = self._held(message)
        if self.config.enable_eplb:
            self.experts = SimulatedExperts(self.rank, self.held, self._first_slot(message), self.config.load_interval)
        digest = config_digest(self.config)
        return Ready(message.term, message.epoch, self.rank, digest, blocks, 4096, 1000, 0.1)

    def _held(self, message: Configure) -> I32Matrix:
        """What stands in this rank's slots now: whole experts are shared out over the ranks that compute."""
        layout = self.engine.coordinator.resolved.layout
        if self.rank not in [member.rank for member in message.members] or not layout.enable_expert_parallel:
            return self.held
        slots, place = self._slots(message)
        first = sum(slots[:place])
        return message.placement[:, first : first + slots[place]]

    def _first_slot(self, message: Configure) -> int:
        slots, place = self._slots(message)
        return sum(slots[:place])

    def _slots(self, message: Configure) -> tuple[list[int], int]:
        """How many slots each rank of this one's stage has, and this one's place among them."""
        members = [member.rank for member in message.members]
        layout = self.engine.coordinator.resolved.layout
        size = layout.tensor_parallel_size
        stage = layout.coordinates(self.rank).pp_rank
        holders = [rank for rank in members if layout.coordinates(rank).pp_rank == stage]
        slots = message.slots.tolist() or slots_per_rank(message.placement.shape[1], len(members) // size * size)
        return list(slots), holders.index(self.rank)

    def beat(self, step: int = 0, inside: bool = False) -> None:
        self.dealer.send(BeatWorker(1, 1, self.rank, step, 0, inside))

    def close(self) -> None:
        self.task.cancel()
        self.dealer.close()


class RawClient:
    """A client's socket: what it sends and reads is the test's business."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self.dealer: Dealer[ToClient] = Dealer(context, endpoint, Codec(ToClient))
        self.seen: list[ToClient] = []
        self._asked: dict[str, int] = {}

    def hello(self, version: int = PROTOCOL_VERSION) -> None:
        self.dealer.send(HelloClient(version, "raw"))

    async def read(self, kind: type[T]) -> T:
        """The next message of ``kind``; others are kept in ``seen``."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await self.dealer.recv()
                self.seen.append(message)
                if isinstance(message, kind):
                    return message

    async def read_for(self, seconds: float) -> list[ToClient]:
        """Everything that comes within ``seconds``."""
        messages: list[ToClient] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    messages.append(await self.dealer.recv())
        except TimeoutError:
            return messages

    async def welcome(self) -> WelcomeClient:
        self.hello()
        return await self.read(WelcomeClient)

    def submit(self, request_id: str, max_tokens: int = 8, n: int = 1, dp_rank: int = -1) -> None:
        self.dealer.send(
            Submit(
                1,
                request_id,
                np.asarray(PROMPT, dtype=np.int32),
                SamplingSpec(seed=SEED),
                max_tokens,
                n=n,
                seed_given=True,
                ignore_eos=True,
                data_parallel_rank=dp_rank,
            )
        )

    async def accepted(self, request_id: str, max_tokens: int = 8, n: int = 1, dp_rank: int = -1) -> Accepted:
        self.submit(request_id, max_tokens, n, dp_rank)
        return await self.read(Accepted)

    async def status(self) -> EngineStatus:
        self.dealer.send(StatusQuery(77))
        while (report := await self.read(StatusReport)).call_id != 77:
            pass
        return msgspec.json.decode(report.status, type=EngineStatus)

    async def status_when(self, condition: Callable[[EngineStatus], bool]) -> EngineStatus:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(status := await self.status()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return status

    async def event(self, kind: str) -> Event:
        """An event of ``kind`` that was not asked for before, in whatever order they come."""
        while True:
            for event in [message for message in self.seen[self._asked.get(kind, 0) :] if isinstance(message, Event)]:
                if event.kind == kind:
                    self._asked[kind] = self.seen.index(event) + 1
                    return event
            await self.read(Event)

    async def engine_failure(self) -> ErrorInfo:
        """The error that ends the engine."""
        while (failed := await self.read(Failed)).request_id:
            pass
        return failed.error

    def close(self) -> None:
        self.dealer.close()


class SimulatedEngine:
    """A coordinator with its supervisor's socket in the test's hands. Ranks join by :meth:`start_ranks`.
    ``num_blocks``: KV blocks of a rank."""

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        num_blocks: Callable[[int], int] = lambda rank: NUM_BLOCKS,
    ) -> None:
        self.num_blocks = num_blocks
        self.context: zmq.Context[Any] = zmq.Context()
        self.order = Order(
            config=config,
            runtime_dir=str(folder),
            client_endpoint=f"ipc://{folder}/client.sock",
            worker_endpoint=f"ipc://{folder}/worker.sock",
            supervisor_token=TOKEN,
            owner_pid=os.getpid(),
        )
        self.coordinator = Coordinator(self.order, resolve(config))
        self.run = asyncio.create_task(self.coordinator.run())
        self.supervisor: Dealer[ToSupervisor] = Dealer(self.context, self.order.worker_endpoint, Codec(ToSupervisor))
        self.ranks: dict[int, SimulatedRank] = {}
        #: What the supervisor was told since the ranks were started.
        self.told: list[ToSupervisor] = []
        self.supervising: asyncio.Task[None] | None = None
        self.clients: list[RawClient] = []

    async def spawns(self) -> list[Spawn]:
        """Say hello as the supervisor; returns what is to be spawned."""
        self.supervisor.send(HelloSupervisor(PROTOCOL_VERSION, TOKEN, 1))
        spawns: list[Spawn] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(spawns) < len(self.coordinator.coordination.membership.ranks):
                message = await self.supervisor.recv()
                if isinstance(message, Spawn):
                    spawns.append(message)
        return spawns

    async def start_ranks(self) -> None:
        for spawn in await self.spawns():
            self.ranks[spawn.rank] = SimulatedRank(self, spawn.rank, spawn.token)
        self.supervising = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        """What a supervisor does from then on: it beats, starts ranks again and kills them; a killed one is told."""
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                message = await self.supervisor.recv()
                self.told.append(message)
                if isinstance(message, Spawn):
                    self.ranks[message.rank] = SimulatedRank(self, message.rank, message.token)
                elif isinstance(message, Kill):
                    self.kill(message.rank)
        except EngineClosed:
            return
        finally:
            beating.cancel()

    async def supervisor_told(self, wanted: Callable[[ToSupervisor], bool]) -> None:
        """Returns once the supervisor has been told something that is ``wanted``."""
        async with asyncio.timeout(PATIENCE_S):
            while not any(wanted(message) for message in self.told):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _beat(self) -> None:
        while True:
            self.supervisor.send(Beat(1))
            await asyncio.sleep(1.0)

    def kill(self, rank: int) -> None:
        """The rank's process is gone, by SIGKILL, and the supervisor says so."""
        victim = self.ranks[rank]
        victim.close()
        self.supervisor.send(Exited(rank, victim.pid, -9, 9))

    def client(self) -> RawClient:
        client = RawClient(self.context, self.order.client_endpoint)
        self.clients.append(client)
        return client

    async def close(self) -> None:
        self.coordinator.end("the test is over")
        await asyncio.wait([self.run], timeout=PATIENCE_S)
        if self.supervising is not None:
            self.supervising.cancel()
        parts: list[SimulatedRank | RawClient] = [*self.ranks.values(), *self.clients]
        for part in parts:
            part.close()
        self.supervisor.close()
        await asyncio.gather(*(rank.task for rank in self.ranks.values()), return_exceptions=True)
        self.context.term()


@asynccontextmanager
async def simulated(
    config: EngineConfig,
    folder: Path,
    *,
    ranks: bool = True,
    num_blocks: Callable[[int], int] = lambda rank: NUM_BLOCKS,
) -> AsyncIterator[SimulatedEngine]:
    """A coordinator in this loop; with ``ranks`` the simulated ones join."""
    engine = SimulatedEngine(config, folder, num_blocks)
    try:
        if ranks:
            await engine.start_ranks()
        yield engine
    finally:
        await engine.close()
