"""What rides on the steps of a lockstep group beside their computing."""

from __future__ import annotations

from typing import Protocol

from drumline.protocol.messages import Shuffle


class Carrier(Protocol):
    """Asked whenever a step is planned."""

    @property
    def demands(self) -> bool:
        """Whether a step is to be made for what it would carry, though nobody has work."""
        ...

    def next(self, step: int, now: float) -> Shuffle | None:
        """What ``step``, which is planned now, carries to all replicas."""
        ...
