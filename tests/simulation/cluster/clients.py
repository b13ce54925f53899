"""A client library: submits, reads, acknowledges, resumes, and comes back when a connection or the coordinator goes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from drumline.protocol.messages import PROTOCOL_VERSION, BeatClient, Cancel, FromClient, HelloClient, Resume
from tests.simulation.cluster.reading import ClientReader
from tests.simulation.cluster.streams import Asked, Wanted

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.wires import Line


class SimClient(ClientReader):
    """One client, connected to the coordinator that listens or waiting for the next."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster, number)
        self.line: Line | None = None
        self._calls = 0
        self._lives = 0
        self._beat()

    # -------------------------------------------------------------------- connections

    def connect(self) -> None:
        """Come to the coordinator that listens, or to the next one."""
        if self.line is None:
            self.cluster.hub.connect_client(self)

    def connected(self, line: Line) -> None:
        """The connection is there."""
        self.line = line
        self.forget_connection()
        self.send(HelloClient(PROTOCOL_VERSION, f"client-{self.number}-{self._lives}", self.term))

    def coordinator_lost(self) -> None:
        """The connection ended."""
        self.line = None
        self.ready = False
        self.clock.soon(0.05, self.connect)

    def lose_connection(self) -> None:
        """The connection breaks, on both sides. Requests that are not durable are given up by the engine."""
        line = self.line
        if line is None:
            return
        self.clock.note(f"client {self.number} loses its connection")
        self.clock.seen["connection_lost"] += 1
        host = self.cluster.hub.host
        self.cluster.hub.lost(line)
        if host is not None:
            self.clock.soon(0.02, partial(host.client_lost, line.identity))
        for asked in self.asked.values():
            if not asked.over and asked.sent and not asked.wanted.submit.durable:
                asked.lost = True
        self.coordinator_lost()

    def restart(self) -> None:
        """The process dies and another one comes, which knows no more than the ids of durable requests."""
        self._lives += 1
        self.clock.seen["client_restart"] += 1
        self.lose_connection()
        for asked in self.asked.values():
            if not asked.ended:
                asked.forgot = True
            for stream in asked.streams:
                if stream.end is None:
                    stream.tokens.clear()
                    stream.logprobs = 0

    def send(self, message: FromClient) -> None:
        """To the coordinator, if there is one."""
        if self.line is not None:
            self.line.up.send(message)

    def _beat(self) -> None:
        self.send(BeatClient(f"client-{self.number}-{self._lives}"))
        self.clock.after(3.0, self._beat)

    # -------------------------------------------------------------------- requests

    def ask(self, wanted: Wanted) -> None:
        """Submit a request, when there is an engine to submit it to."""
        asked = Asked(wanted)
        self.asked[asked.request_id] = asked
        if wanted.cancel_at >= 0:
            self.clock.at(wanted.cancel_at, partial(self._cancel, asked))
        if self.ready:
            self.submit(asked)

    def submit(self, asked: Asked) -> None:
        self._calls += 1
        asked.call_id = self._calls
        asked.sent += 1
        self.send(msgspec.structs.replace(asked.wanted.submit, call_id=asked.call_id))

    def _cancel(self, asked: Asked) -> None:
        if asked.over or not asked.sent:
            return
        self._calls += 1
        asked.cancel_calls.add(self._calls)
        self.clock.seen["cancel"] += 1
        if self.ready:
            self.send(Cancel(self._calls, asked.request_id))

    def resume(self, asked: Asked) -> None:
        self._calls += 1
        asked.resumes += 1
        self.clock.seen["resume"] += 1
        positions = tuple(stream.read for stream in asked.streams)
        if self.knows_all or asked.forgot:
            self.send(Resume(self._calls, asked.request_id, positions))
            return
        spec = msgspec.structs.replace(asked.wanted.submit.sampling, seed=asked.seed)
        submit = msgspec.structs.replace(asked.wanted.submit, sampling=spec, seed_given=True)
        tokens = tuple(np.asarray(stream.tokens, dtype=np.int32) for stream in asked.streams)
        self.send(Resume(self._calls, asked.request_id, positions, tokens, submit))

    def come_back(self) -> None:
        """The engine is ready: say again all that it may not know."""
        for asked in list(self.asked.values()):
            if asked.over:
                continue
            if not asked.ever_accepted:
                self.submit(asked)
            else:
                self.resume(asked)
            for call_id in asked.cancel_calls:
                self.send(Cancel(call_id, asked.request_id))
