"""What the coordinator's decisions depend on."""

from __future__ import annotations

import msgspec

from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.members import MembershipConfig
from drumline.protocol.layout import Layout


class CoordinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``seed`` is where the seeds of requests without one come from, ``hash_key`` that of the prefix cache's hashes.
    ``balance``: None where experts stay where they are."""

    membership: MembershipConfig
    core: CoreConfig
    layout: Layout
    seed: int = 0
    hash_key: int = 0
    step_deadline_s: float | None = None
    balance: BalanceConfig | None = None
