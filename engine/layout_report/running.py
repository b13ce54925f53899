"""The layout of a running engine: what a coordinator says of it, and the report that a client makes of that.

The coordinator sends the facts, a millisecond's work; a report of many ranks takes longer and is made by who asks.
"""

from __future__ import annotations

import msgspec

from drumline.engine.layout_report.question import Question, ask
from drumline.engine.layout_report.report import LayoutReport, report
from drumline.engine.resolve import ResolvedConfig
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import NO_MATRIX, NO_NUMBERS, LayoutFacts
from drumline.protocol.placement import I32


def layout_facts(
    call_id: int,
    resolved: ResolvedConfig,
    placement: I32 | None = None,
    device: str = "cuda",
    slots: I32 = NO_NUMBERS,
) -> LayoutFacts:
    """The answer to a LayoutQuery. ``placement``: int32 (moe_layers, slots); None: the one it started with. ``slots``:
    int32 (ep ranks,), how many of them each rank has; empty: shared out evenly."""
    if placement is None:
        placement = resolved.placements.get(0)  # all replicas of a MoE model are one lockstep group
    question = msgspec.json.encode(ask(resolved.config, spec=resolved.spec, device=device))
    return LayoutFacts(call_id, question, NO_MATRIX if placement is None else placement, slots)


def report_of(facts: LayoutFacts) -> LayoutReport:
    """The report. Raises ProtocolError for facts that do not decode."""
    try:
        question = msgspec.json.decode(facts.question, type=Question)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"the coordinator's layout does not decode: {error}") from error
    return report(question, facts.placement if question.spec.is_moe else None, facts.slots)
