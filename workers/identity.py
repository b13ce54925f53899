"""Who a worker process is."""

from __future__ import annotations

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """Its rank, the uuid of this start, and the launch token that it shows."""

    rank: int
    incarnation: str
    token: str
