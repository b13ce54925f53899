"""Faults on purpose, around a real engine: :class:`FaultyEngine`, scenarios, and how outputs are compared.

Names are imported when they are first used: scenarios alone need nothing but msgspec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drumline.engine.lazy import lazy_names

if TYPE_CHECKING:
    from drumline.engine.testing.equal import Comparison, Sequence, compare
    from drumline.engine.testing.faulty_engine import FaultyEngine
    from drumline.engine.testing.records import InjectedFault, InjectionFailed
    from drumline.engine.testing.scenario import Chances, Scenario, ScheduledFault, random_scenario

__all__ = [
    "Chances",
    "Comparison",
    "FaultyEngine",
    "InjectedFault",
    "InjectionFailed",
    "Scenario",
    "ScheduledFault",
    "Sequence",
    "compare",
    "random_scenario",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Chances": "scenario",
        "Comparison": "equal",
        "FaultyEngine": "faulty_engine",
        "InjectedFault": "records",
        "InjectionFailed": "records",
        "Scenario": "scenario",
        "ScheduledFault": "scenario",
        "Sequence": "equal",
        "compare": "equal",
        "random_scenario": "scenario",
    },
)
