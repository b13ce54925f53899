"""One simulated worker process: a control thread that always answers, and a main thread that loads, meets and
computes. What it checks is what a real one checks; what it is told that can never be right breaks a rule."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    CancelStage,
    Configure,
    Fault,
    I32Matrix,
    Inject,
    Leave,
    Left,
    Load,
    Loaded,
    OpenStore,
    Ready,
    Shutdown,
    StageExperts,
    Step,
    StepDone,
    StoreReady,
    ToWorker,
    WelcomeWorker,
)
from tests.simulation.cluster.rank_connection import RankConnection
from tests.simulation.cluster.rank_layer import RankLayer, left_over, no_spare
from tests.simulation.cluster.shape import DIGEST

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.epoch_run import EpochRun

LEAVE_S = 0.02
NOTHING: I32Matrix = np.zeros((0, 0), dtype=np.int32)
NO_TOKENS = np.zeros(0, dtype=np.int32)


class SimRank(RankConnection):
    """A process. ``run`` is the epoch that it is in, ``held`` what its expert slots hold, ``spare``, int32 (moe_layers,
    any number), what it has whole besides. ``layer``: whose experts are being moved, ``generation``: the newest
    (term, generation) that it was told to stage. ``begun``: the newest step that its main thread has come to."""

    def __init__(self, cluster: Cluster, rank: int, token: str, pid: int) -> None:
        super().__init__(cluster, rank, token, pid)
        self.said_left = False
        self.loading = False
        self.held = NOTHING
        self.spare = NOTHING
        self.layer: RankLayer | None = None
        self.generation = (0, 0)
        self.run: EpochRun | None = None
        self.runs = 0
        self.inbox: deque[Step | StageExperts | CancelStage] = deque()
        self.expected = 0
        self.begun = -1
        self._handlers = {
            WelcomeWorker: self._welcome,
            Load: self._load,
            Leave: self._leave,
            OpenStore: self._open_store,
            Configure: self._configure,
            Step: self._step,
            StageExperts: self._shuffle,
            CancelStage: self._shuffle,
            Shutdown: self._shutdown,
            Inject: lambda message: None,
        }

    def ended(self, code: int, signal: int) -> None:
        run, self.run = self.run, None
        if run is not None:
            run.gone(self, "died")
        if self.line is not None:
            self.line.cut()
        self.cluster.supervisor.ended(self, code, signal)

    def went_on(self) -> None:
        if self.run is not None:
            self.run.wake()

    # -------------------------------------------------------------------- loading

    def _welcome(self, message: WelcomeWorker) -> None:
        if message.digest != DIGEST:
            self.broken(f"is welcomed with digest {message.digest}")
        self.term = message.term
        self._welcomed = True

    def _load(self, message: Load) -> None:
        if not self.tampered and (self._told_to_load or not self._welcomed):
            self.broken("is told to load before its welcome, or again")
        self._told_to_load = True
        # The Hello to the next coordinator may have been said while it loaded.
        if self.loaded and self._welcomed:
            self._say_loaded()
        if self.loading or self.loaded or not self._welcomed:
            return
        self.loading = True
        cluster = self.cluster
        total = cluster.clock.random.uniform(0.5, 1.5) * cluster.shape.load_s
        self.later(total, partial(self._loaded, message.experts))
        self.later(total * cluster.clock.random.random(), partial(cluster.faults.point, self, "loading"))

    def _loaded(self, experts: I32Matrix) -> None:
        if self.hung:
            return
        shape = self.cluster.shape
        self.loading, self.loaded = False, True
        self.held = experts.copy()
        self.spare = no_spare(self.held)
        if self.held.size:
            # Of the layers of other stages it has none.
            stage = shape.layout.coordinates(self.rank).pp_rank
            self.held[[layer for layer, of_layer in enumerate(shape.moe_layer_stage) if of_layer != stage]] = -1
        self._say_loaded()

    def _say_loaded(self) -> None:
        shape = self.cluster.shape
        self.send(
            Loaded(self.term, self.rank, DIGEST, shape.num_blocks, 64, 1000, shape.load_s, "cpu", shape.free_bytes)
        )

    # -------------------------------------------------------------------- epochs

    def _leave(self, message: Leave) -> None:
        told = (message.term, message.epoch)
        if told <= self.left:
            self.stale += 1
            if told == self.left and not self.tampered:
                self.broken(f"is told twice to leave for {told}")
            return
        if not self.loaded and not self.tampered:
            self.broken(f"is told to leave for {told} and has not loaded")
        self.term = max(self.term, message.term)
        self.left = told
        self.said_left = False
        self.out_of_epoch("left")
        self.soon(LEAVE_S, partial(self._leaving, told))

    def _leaving(self, told: tuple[int, int]) -> None:
        self.cluster.faults.point(self, "leave")
        if not self.alive or self.stopped:
            self._wake(partial(self._out, told))
            return
        self._out(told)

    def _out(self, told: tuple[int, int]) -> None:
        if self.hung or told != self.left:
            return
        self.said_left = True
        shape = self.cluster.shape
        held, spare = np.hstack([self.held, self.spare]), self.spare.shape[1]
        self.clock.seen["left_with_spare"] += int(np.count_nonzero(self.spare >= 0) > 0)
        self.send(Left(*told, self.rank, held, shape.num_blocks, shape.free_bytes, spare))

    def out_of_epoch(self, why: str) -> None:
        """Come out of the epoch; peers in its collectives will miss this rank."""
        run, self.run = self.run, None
        self.inbox.clear()
        if self.layer is not None:
            self.spare = left_over(self.layer, self.held)
            self.layer = None
        if run is not None:
            run.gone(self, why)

    def _open_store(self, message: OpenStore) -> None:
        if not self._is_present(message.term, message.epoch, message):
            return
        self.soon(0.002, partial(self._store_open, message))

    def _store_open(self, message: OpenStore) -> None:
        if self.hung or self.left != (message.term, message.epoch):
            return
        port = self.cluster.open_store(self, self.left)
        self.send(StoreReady(message.term, message.epoch, self.rank, message.host, port))

    def _is_present(self, term: int, epoch: int, message: ToWorker) -> bool:
        """Whether the message is about the epoch that this rank has come out for."""
        if (term, epoch) < self.left:
            self.stale += 1
            self.clock.seen["stale_at_rank"] += 1
            return False
        if (term, epoch) != self.left or not self.said_left:
            name = type(message).__name__
            self.out_of_order(f"gets {name} of {(term, epoch)}, has left for {self.left}: {self.said_left}")
            return False
        return True

    def _configure(self, message: Configure) -> None:
        if not self._is_present(message.term, message.epoch, message):
            return
        if self.run is not None:
            self.out_of_order(f"is configured twice for {self.left}")
            return
        # One that stops or ends at this point has still been told.
        self.cluster.faults.point(self, "regroup")
        if self.runs == 0:
            self.cluster.faults.point(self, "joining")
        self.expected = 0
        self.begun = -1
        self.position = (0, 0, False)
        self._wake(partial(self._enter, message))

    def _enter(self, message: Configure) -> None:
        if (message.term, message.epoch) == self.left and self.run is None and not self.hung:
            self.cluster.enter(self, message)

    def ready(self) -> None:
        """Experts are in place and the groups formed."""
        self.runs += 1
        self.spare = no_spare(self.held)
        shape = self.cluster.shape
        self.send(Ready(*self.left, self.rank, DIGEST, shape.num_blocks, 64, 1000, shape.load_s, "cpu"))

    # -------------------------------------------------------------------- steps

    def _step(self, message: Step) -> None:
        told = (message.term, message.epoch)
        if told < self.left or (told == self.left and self.run is None and self.said_left):
            # After its own Fault a rank may still be sent steps of the epoch that it has left.
            self.stale += 1
            return
        if told != self.left or self.run is None or not self.run.formed:
            self.out_of_order(f"gets step {message.step} of {told}, has left for {self.left}")
            return
        if message.step != self.expected:
            self.out_of_order(f"gets step {message.step} of {told}, expects {self.expected}")
            return
        self.expected += 1
        self.inbox.append(message)
        self.run.pick_up(self)

    def _shuffle(self, message: StageExperts | CancelStage) -> None:
        told = (message.term, message.epoch)
        if told < self.left or (told == self.left and self.run is None and self.said_left):
            self.stale += 1
            return
        if told != self.left or self.run is None or self.run.shuffles is None:
            self.out_of_order(f"gets {message}, has left for {self.left}")
            return
        self.inbox.append(message)
        self.run.pick_up(self)

    def step_done(self, run: EpochRun, done: StepDone) -> None:
        """The main thread is out of a step."""
        if self.run is run:
            self.position = (done.step, 100, False)
            self.send(done)

    def fault(self, kind: str, text: str, rows: tuple[int, ...] = ()) -> None:
        """An exception: the rank leaves its epoch, says so and stays."""
        if not self.alive or self.hung:
            return
        self.clock.note(f"{self} fails: {kind}: {text}")
        error = ErrorInfo(kind=kind, text=text, rank=self.rank, incarnation=self.incarnation, epoch=self.left[1])
        told = self.left
        self.out_of_epoch("failed")
        self.send(Fault(*told, self.rank, error, rows))

    def out_of_order(self, what: str) -> None:
        """Something that can come only when messages were tampered with; the rank reports it. Else a rule is broken."""
        if not self.tampered:
            self.broken(what)
        self.cluster.faults.from_inside += 1
        self.fault("protocol", what)

    # -------------------------------------------------------------------- end

    def _shutdown(self, message: Shutdown) -> None:
        self.fenced = True
        self.clock.seen["shutdown"] += 1
        self.clock.note(f"{self} is shut down: {message.reason}")
        self.soon(0.01, self.end)
