"""Faults that a client orders, checked and handed to those that bring them about."""

from __future__ import annotations

from drumline.engine.core.coordination import Coordination
from drumline.engine.keeping import Keeping
from drumline.engine.worker_port import WorkerPort
from drumline.protocol.errors import ErrorInfo, InvalidRequest
from drumline.protocol.fault_names import DIRECTIONS, MESSAGE_KINDS, POINTS, RANK_KINDS, TAKEN_BACK
from drumline.protocol.messages import FaultsInjected, InjectFaults

KINDS = (*RANK_KINDS, TAKEN_BACK)


class InjectOrders:
    """``allowed``: whether the engine was made with ``fault_injection``."""

    def __init__(self, workers: WorkerPort, keeping: Keeping, coordination: Coordination, allowed: bool) -> None:
        self._workers = workers
        self._keeping = keeping
        self._coordination = coordination
        self._allowed = allowed

    def take(self, message: InjectFaults, now: float) -> FaultsInjected:
        """Bring the faults about. Nothing of an order that is wrong anywhere is done."""
        error = self._refusal(message)
        if error is not None:
            return FaultsInjected(message.call_id, error)
        workers = self._workers
        if message.clear:
            workers.injections.clear()
            if workers.faults is not None:
                workers.faults.clear()
        workers.injections.add(message.injections)
        if workers.faults is not None and message.messages:
            workers.faults.add(message.messages, now)
        if message.full_disk >= 0 and not self._keeping.limit(bool(message.full_disk)):
            return FaultsInjected(message.call_id, _wrong("full_disk", message.full_disk, "-1: there is no journal"))
        if message.clear or message.injections:
            workers.send_injections(now)
        return FaultsInjected(message.call_id)

    def _refusal(self, message: InjectFaults) -> ErrorInfo | None:
        if not self._allowed:
            return _wrong("fault_injection", False, "an engine made with fault_injection=True")
        ranks = self._coordination.membership.ranks
        last = max(ranks)
        for one in message.injections:
            if one.rank not in ranks:
                return _wrong("rank", one.rank, f"0 to {last}")
            if one.kind not in KINDS:
                return _wrong("kind", one.kind, "one of " + ", ".join(KINDS))
            if one.point not in POINTS:
                return _wrong("point", one.point, "one of " + ", ".join(POINTS))
        for rule in message.messages:
            if rule.kind not in MESSAGE_KINDS:
                return _wrong("kind", rule.kind, "one of " + ", ".join(MESSAGE_KINDS))
            if rule.direction not in DIRECTIONS:
                return _wrong("direction", rule.direction, "one of " + ", ".join(DIRECTIONS))
            if not 0.0 <= rule.probability <= 1.0:
                return _wrong("probability", rule.probability, "0.0 to 1.0")
            if any(rank not in ranks for rank in rule.ranks):
                return _wrong("ranks", list(rule.ranks), f"ranks from 0 to {last}")
        return None


def _wrong(field: str, found: object, valid: str) -> ErrorInfo:
    return InvalidRequest(field, found, valid).info
