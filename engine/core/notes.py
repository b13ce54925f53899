"""What a journal has to know of requests beside their tokens."""

from __future__ import annotations

import msgspec

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
