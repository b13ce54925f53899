"""What a journal has to know of requests beside their tokens."""

from __future__ import annotations

import msgspec

from drumline.engine.core.request import Request
from drumline.protocol.messages import Submit


class Notes(msgspec.Struct, frozen=True):
    """What happened to requests since the last notes, each list in order.

    ``accepted``: (submit with the seed that was drawn, first stream handle). ``rehandled``: (request id, first stream
    handle) of requests that go on under other handles. ``forgotten``: ids of requests that are over for good; one that
    is accepted anew in the same notes was forgotten first.
    """

    accepted: tuple[tuple[Submit, int], ...] = ()
    rehandled: tuple[tuple[str, int], ...] = ()
    forgotten: tuple[str, ...] = ()


class NotePad:
    """Collects until :meth:`take`. Of a request that is accepted and forgotten before, nothing is left."""

    def __init__(self) -> None:
        self.accepted: dict[str, tuple[Submit, int]] = {}
        self._rehandled: dict[str, int] = {}
        self._forgotten: dict[str, None] = {}

    def accept(self, request: Request) -> None:
        """The request has been taken in."""
        self.accepted[request.request_id] = request.submit, request.sequences[0].stream

    def rehandle(self, request: Request) -> None:
        """The request has other handles."""
        if request.request_id in self.accepted:
            self.accept(request)
        else:
            self._rehandled[request.request_id] = request.sequences[0].stream

    def forget(self, request_id: str) -> None:
        """The request is over for good."""
        self.accepted.pop(request_id, None)
        self._rehandled.pop(request_id, None)
        self._forgotten[request_id] = None

    def take(self) -> Notes | None:
        """Everything collected, None for nothing, and forgets it."""
        if not (self.accepted or self._rehandled or self._forgotten):
            return None
        notes = Notes(tuple(self.accepted.values()), tuple(self._rehandled.items()), tuple(self._forgotten))
        self.accepted.clear()
        self._rehandled.clear()
        self._forgotten.clear()
        return notes
