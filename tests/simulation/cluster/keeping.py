"""What a simulated coordinator keeps: the real order of delivery, behind a journal on the virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.delivery import Delivery
from drumline.engine.keeping import Keeping
from drumline.protocol.messages import Event
from tests.simulation.cluster.disk import SimJournal

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.host import Host


class SimKeeping(Keeping):
    """The real one, on a simulated journal, or on none."""

    def __init__(self, cluster: Cluster, host: Host) -> None:
        disk = cluster.disk
        self._host = host
        self._core = None
        self._frozen = False
        self._on_state = self._told
        self.term = host.term
        self.sim: SimJournal | None = None
        self.restored = ()
        self.knows_all = host.term == 1
        if cluster.shape.keeps_journal:
            self.sim = SimJournal(cluster, disk, self._state_changed, host.act)
            self.restored = disk.restored()
            self.knows_all = host.term == 1 or self.sim.whole
            disk.term = host.term
        self._journal = self.sim  # type: ignore[assignment]  # has what is asked of a journal
        self.delivery = Delivery(self._journal)

    def _told(self, state: str, text: str) -> None:
        self._host.clock.note(f"journal {state}: {text}")
        self._host.clients.connections.broadcast(Event("journal", f"journal: {state}: {text}"))

    def push(self, notes: Notes | None, outputs: list[ConnectionOutput], send: Callable[[], None]) -> None:
        """As the real one does. What is raised while sending is not lost in a log: it fails the run."""

        def watched() -> None:
            try:
                send()
            except Exception as error:
                self._host.cluster.failure = error
                raise

        super().push(notes, outputs, watched)

    def flush(self) -> None:
        """Commit and deliver what waits."""
        if self.sim is not None:
            self.sim.flush()

    def crash(self) -> None:
        """The coordinator is killed."""
        if self.sim is not None:
            self.sim.crash()
