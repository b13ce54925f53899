"""Faults on purpose, around a real engine: :class:`FaultyEngine`, scenarios, and how outputs are compared.

Names are imported when they are first used: scenarios alone need nothing but msgspec.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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

_HOMES = {
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
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
