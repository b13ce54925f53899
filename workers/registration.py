"""A rank's registration with its coordinator: Hello, Welcome, and what becomes of the rank when the coordinator goes.

A coordinator that goes away leaves its ranks their lease (``coordinator_lease_s``): they come out of their epoch, keep
weights and cache, and say Hello to the next coordinator at the same endpoint, which must be of no older term.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from drumline.protocol.codec import config_digest
from drumline.protocol.errors import EngineClosed, ProtocolError
from drumline.protocol.messages import PROTOCOL_VERSION, HelloWorker, WelcomeWorker, WorkerConfig
from drumline.workers.connection import Connection
from drumline.workers.identity import Identity
from drumline.workers.lease import Lease

log = logging.getLogger(__name__)

WELCOME_DEADLINE_S = 30.0
LOOK_S = 0.5


class NoCoordinator(EngineClosed):
    """There is no coordinator, and none is waited for any longer."""


class Registration:
    """``token_file``: of a rank without a lifeline, there for as long as its engine is. ``now``: monotonic seconds."""

    def __init__(self, identity: Identity, endpoint: str, token_file: Path | None, now: float) -> None:
        self.connection = Connection(endpoint)
        self.welcomed = False
        self.config: WorkerConfig | None = None
        self.term = -1
        #: The newest (term, epoch) that was ordered.
        self.newest = (-1, -1)
        self._identity = identity
        self._token_file = token_file
        self._lease = Lease()
        self._welcome_by = now + WELCOME_DEADLINE_S

    @property
    def on_lease(self) -> bool:
        """Whether the coordinator that had welcomed the rank is gone, and the next one is waited for."""
        return self._lease.runs

    def greet(self, loaded_digest: str) -> None:
        """Connect and say Hello; ``loaded_digest``: of the configuration that weights were loaded for, or empty."""
        self.connection.open()
        me, epoch = self._identity, max(self.newest[1], 0)
        who = (me.token, me.rank, me.incarnation, os.getpid(), socket.gethostname())
        term, loaded = max(self.term, 0), bool(loaded_digest)
        self.connection.send(HelloWorker(PROTOCOL_VERSION, *who, term, epoch, loaded, loaded_digest))

    def accept(self, message: WelcomeWorker) -> bool:
        """Whether this Welcome counts: the first on its connection, of a term that is not older.

        Raises EngineClosed for one of an older term, ProtocolError when the rank is of no use to the coordinator.
        """
        if self.welcomed:
            return False
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {message.version} found, {PROTOCOL_VERSION} spoken here")
        if message.term < self.term:
            raise EngineClosed(f"the coordinator there has term {message.term}, older than {self.term}")
        if self.config is not None and config_digest(message.config) != config_digest(self.config):
            raise ProtocolError("another configuration than that of the coordinator before")
        self._lease.welcomed()
        self.welcomed = True
        self.term = message.term
        self.config = message.config
        return True

    def lose(self, error: EngineClosed, now: float) -> bool:
        """The connection is lost, or of no use: try again within the lease. Whether the coordinator had welcomed the
        rank. Raises ``error`` when there is nothing to wait for."""
        lease_s = self.config.coordinator_lease_s if self.config is not None else 0.0
        if lease_s <= 0 or isinstance(error, NoCoordinator):
            raise error
        if not self._lease.runs:
            log.warning("the coordinator is gone (%s); waiting %.1f s for the next one", error.text, lease_s)
        self._lease.lost(now, lease_s)
        self.connection.drop()
        had, self.welcomed = self.welcomed, False
        return had

    def seek(self, now: float, loaded_digest: str) -> None:
        """Without a coordinator: connect when it is time to. Raises NoCoordinator when none has come in time."""
        endpoint = self.connection.endpoint
        if self._token_file is not None and not self._token_file.exists():
            # A connection that never stood cannot be lost; the folder of an engine goes when the engine does.
            raise NoCoordinator(f"the engine is gone, and {self._token_file} with it")
        if not self._lease.runs:
            if now >= self._welcome_by:
                raise NoCoordinator(f"no welcome from {endpoint} within {WELCOME_DEADLINE_S:.0f} s")
        elif self._lease.over(now):
            raise NoCoordinator(f"no other has welcomed this rank at {endpoint} within its lease")
        elif not self.connection.is_open and now >= self._lease.retry_at:
            self.greet(loaded_digest)

    def due_at(self, now: float) -> float:
        """When to call :meth:`seek`, without a coordinator."""
        if self._lease.ends_at is None:
            return min(self._welcome_by, now + LOOK_S)
        moment = min(self._lease.ends_at, now + LOOK_S)
        return moment if self.connection.is_open else min(moment, self._lease.retry_at)
