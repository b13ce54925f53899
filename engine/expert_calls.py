"""What an app asks of the balance of experts."""

from __future__ import annotations

import abc
import asyncio
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from drumline.engine.connection import Connection
from drumline.engine.expert_records import LoadRecord, save_load_record
from drumline.protocol.errors import InvalidRequest, ProtocolError, RequestFailed, from_info
from drumline.protocol.messages import (
    NO_MATRIX,
    ExpertLoad,
    ExpertLoadQuery,
    ExpertsRebalanced,
    I32Matrix,
    ModelInfo,
    RebalanceExperts,
    RebalanceReport,
)

DEFAULT_TIMEOUT_S = 600.0
# The coordinator answers once the timeout has passed; the answer needs time to travel.
_SLACK_S = 5.0


class ExpertCalls(abc.ABC):
    """The part of an engine that is about experts."""

    @abc.abstractmethod
    def _require_ready(self) -> tuple[Connection, ModelInfo]:
        """The connection. Raises EngineClosed when there is none."""

    async def rebalance_experts(self, plan: Any = None, *, timeout: float | None = None) -> RebalanceReport:
        """Plans a placement of experts for the load of now and carries it out, while requests go on; returns when that
        is over. With ``plan``, whole numbers (moe_layers, slots), that is the placement.

        The report's ``outcome`` is moved, unchanged (nothing worth moving), cancelled (by a fault, or by a later call)
        or failed; ``reason`` says why. Raises :class:`InvalidRequest` for a plan that cannot be and for an engine that
        was not made with ``enable_eplb``, ``RequestFailed`` after ``timeout`` seconds (600), and when the coordinator
        is lost meanwhile; what was begun then goes on, or is given up.
        """
        connection, _ = self._require_ready()
        placement, limit = _placement(plan), _seconds(timeout)
        answer: ExpertsRebalanced = await connection.call(
            lambda call_id: RebalanceExperts(call_id, placement, limit), "rebalance_experts", limit + _SLACK_S
        )
        if answer.error is not None:
            raise from_info(answer.error)
        if answer.report is None:
            raise ProtocolError("the coordinator answered to rebalance_experts without a report")
        return answer.report

    async def expert_load(self) -> LoadRecord:
        """The expert load of the window, in at most 8 snapshots, and the placement of now. Raises
        :class:`InvalidRequest` for an engine that was not made with ``enable_eplb``."""
        connection, _ = self._require_ready()
        load: ExpertLoad = await connection.call(ExpertLoadQuery, "expert_load")
        if load.error is not None:
            raise from_info(load.error)
        return load_record(load)

    async def save_expert_load(self, path: str | os.PathLike[str]) -> None:
        """Writes the load record, an .npz that ``init_placement`` takes. Raises ``RequestFailed`` while nothing has
        been counted, ``DrumlineError`` when the file cannot be written."""
        record = await self.expert_load()
        if not len(record.steps):
            raise RequestFailed("no expert load has been reported yet: ranks report every load_interval steps")
        await asyncio.to_thread(_save, path, record)


def _save(path: str | os.PathLike[str], record: LoadRecord) -> None:
    save_load_record(Path(path).expanduser(), record)


def load_record(load: ExpertLoad) -> LoadRecord:
    """What the coordinator says of its window."""
    snapshots = len(load.steps)
    tokens = load.tokens.reshape(snapshots, load.num_layers, -1) if snapshots else np.zeros((0, load.num_layers, 0))
    return LoadRecord(tokens.astype(np.float64), load.steps.astype(np.int64), load.placement)


def _placement(plan: Any) -> I32Matrix:
    if plan is None:
        return NO_MATRIX
    valid = "None, or whole numbers (moe_layers, slots): the logical expert of each slot"
    try:
        found = np.asarray(plan)
    except (ValueError, TypeError, OverflowError):
        raise InvalidRequest("plan", type(plan).__name__, valid) from None
    if found.ndim != 2 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise InvalidRequest("plan", f"{found.dtype} {found.shape}", valid)
    if found.min() < 0 or found.max() >= 1 << 31:
        raise InvalidRequest("plan", f"experts {found.min()} to {found.max()}", "experts of the model, from 0")
    placement: I32Matrix = np.ascontiguousarray(found, dtype=np.int32)
    return placement


def _seconds(timeout: object) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InvalidRequest("timeout", timeout, "seconds, above 0")
    return float(timeout)
