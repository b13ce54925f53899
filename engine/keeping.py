"""What a coordinator keeps for the one after it: its term, and the journal through which everything to clients goes."""

from __future__ import annotations

from collections.abc import Callable

from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.core.restored import RestoredRequest
from drumline.engine.delivery import Delivery
from drumline.engine.journal import Batch, Journal, journal_term
from drumline.engine.journal.batches import make_batch
from drumline.engine.launch.order import Order
from drumline.engine.terms import raise_term

JOURNAL_NAME = "journal.sqlite"
OFF = "off"


class Keeping:
    """``restored``: the requests that an earlier coordinator had accepted and not ended for good. ``knows_all``:
    whether that is all there are: not without a journal, or after one that missed something.

    ``on_state`` is told in the loop when the journal's state changes (on, degraded) or a damaged one was set aside,
    ``on_superseded`` when another coordinator has taken over. Raises InvalidConfig for a journal that cannot be kept,
    EngineClosed for one that is another coordinator's, StartFailed when the term cannot be raised.
    """

    def __init__(
        self, order: Order, on_state: Callable[[str, str], None], on_superseded: Callable[[str], None]
    ) -> None:
        self.restored: tuple[RestoredRequest, ...] = ()
        self._journal: Journal | None = None
        self._on_state = on_state
        self._core: EngineCore | None = None
        self._frozen = False
        path = order.config.journal or f"{order.runtime_dir}/{JOURNAL_NAME}"
        least = order.term if path == OFF else max(order.term, journal_term(path) + 1)
        self.term = raise_term(order.runtime_dir, least)
        self.knows_all = self.term == 1
        if path != OFF:
            self._journal, self.restored = Journal.open(
                path, self.term, on_state=self._state_changed, on_superseded=on_superseded
            )
            self.knows_all = self.term == 1 or self._journal.whole
        self.delivery = Delivery(self._journal)

    @property
    def state(self) -> str:
        """on, degraded or off."""
        return OFF if self._journal is None else self._journal.state

    def push(self, notes: Notes | None, outputs: list[ConnectionOutput], send: Callable[[], None]) -> None:
        """Call ``send`` once everything until now has been kept: ``notes`` of requests, the tokens of ``outputs``."""
        batch: Batch | None = None
        if self._journal is not None and not self._frozen and (notes is not None or outputs):
            batch = make_batch(notes, outputs)
        self.delivery.push(batch, send)

    def freeze(self) -> None:
        """From now on nothing is written down: what the journal holds is for the next engine to go on with."""
        self._frozen = True

    def keep_whole(self, core: EngineCore) -> None:
        """Whose requests are written down in one go when the journal can be written to again."""
        self._core = core

    def _state_changed(self, state: str, text: str) -> None:
        if state == "writable" and self._journal is not None:
            snapshot = self._core.snapshot() if self._core is not None else self.restored
            self._journal.recover(snapshot)
            return
        self._on_state(state, text)

    def limit(self, full: bool) -> bool:
        """Make the journal find its disk full, or let it be. Whether there is one."""
        if self._journal is None:
            return False
        self._journal.limit(full)
        return True

    def counters(self) -> dict[str, int]:
        """Batches queued and committed, by name."""
        return self.delivery.counters()

    def close(self) -> None:
        """Commit what waits, send what waited for it, and let go of the file."""
        if self._journal is not None:
            self._journal.close()
        self.delivery.close()
