"""Which requests must run apart: those that may kill the ranks that compute them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]


class Confinement:
    """``active`` requests run on ``replica`` (counted over all groups) and nobody else does; ``held`` ones run nowhere.
    Nobody is confined while there are no active ones."""

    def __init__(self, active: Collection[str] = (), held: Collection[str] = (), replica: int | None = None) -> None:
        if bool(active) != (replica is not None):
            raise ValueError(f"{len(active)} requests confined to replica {replica}")
        self.active = frozenset(active)
        self.held = frozenset(held)
        self.replica = -1 if replica is None else replica

    def __bool__(self) -> bool:
        return self.replica >= 0

    def allowed(self, request_id: str, serving: Flags, fits: Flags) -> Flags:
        """bool (replicas,): where the request may run now; ``serving`` ones compute, ``fits`` are large enough for it.
        One that is too large for the replica of the confined runs as others do."""
        if not self:
            return serving & fits
        alone = np.zeros_like(serving)
        if request_id in self.held:
            return alone
        alone[self.replica] = True
        if request_id in self.active and fits[self.replica]:
            return alone
        others: np.ndarray[Any, np.dtype[np.bool_]] = serving & fits & ~alone
        return others

    def must_leave(self, request_id: str, replica: int, fits: Flags) -> bool:
        """Whether the request may not stay where it is, on ``replica``, even if there is no other place."""
        if not self:
            return False
        active = request_id in self.active and bool(fits[self.replica])
        return request_id in self.held or active != (replica == self.replica)
