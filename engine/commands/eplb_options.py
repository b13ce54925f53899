"""The flags that say how experts are balanced, and the :class:`EPLBConfig` that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import msgspec

from drumline.engine.core.balance.plan import POLICIES
from drumline.engine.eplb_config import EPLBConfig
from drumline.protocol.errors import InvalidConfig

EPLB_OPTIONS = [
    click.option("--eplb-window-size", type=int, metavar="N", help="Steps of expert load kept; default: 1000."),
    click.option("--eplb-step-interval", type=int, metavar="N", help="Steps between two plans; default: 3000."),
    click.option(
        "--eplb-log-balancedness", is_flag=True, default=None, help="Log the balance of experts at every report."
    ),
    click.option("--eplb-policy", metavar="NAME", help=f"{', '.join(POLICIES)}; default: {POLICIES[0]}."),
    click.option(
        "--eplb-max-moved", type=float, metavar="F", help="Share of slots that a plan changes; default: 0.25."
    ),
    click.option("--eplb-min-gain", type=float, metavar="F", help="Balancedness that a plan gains; default: 0.01."),
    click.option("--eplb-bytes-per-step", metavar="8MiB", help="That a rank moves beside a step; default: 8MiB."),
    click.option("--eplb-load-interval", type=int, metavar="N", help="Steps between reports of load; default: 32."),
    click.option("--eplb-record", metavar="FILE", help="Write the load of experts here, at each plan and at the end."),
    click.option("--eplb-config", metavar="JSON", help="All of these at once, as vLLM has it; flags come first."),
]
EPLB_FLAGS = {
    "num_redundant_experts": "num_redundant_experts",
    "init_expert_placement": "init_placement",
    "eplb_window_size": "window_size",
    "eplb_step_interval": "step_interval",
    "eplb_log_balancedness": "log_balancedness",
    "eplb_policy": "policy",
    "eplb_max_moved": "max_moved",
    "eplb_min_gain": "min_gain",
    "eplb_bytes_per_step": "bytes_per_step",
    "eplb_load_interval": "load_interval",
    "eplb_record": "record_path",
}
"""Flags that stand for a field of :class:`EPLBConfig`."""


def eplb_config(text: str | None, flags: Mapping[str, Any]) -> EPLBConfig:
    """The configuration that ``text`` (JSON) and flags make; a flag that was not given is None or not there. Raises
    InvalidConfig."""
    fields = _from_json(text)
    for flag, field in EPLB_FLAGS.items():
        if flags.get(flag) is not None:
            fields[field] = flags[flag]
    if isinstance(fields.get("bytes_per_step"), str):
        from drumline.engine.layout_report.question import parse_bytes

        fields["bytes_per_step"] = parse_bytes("bytes_per_step", fields["bytes_per_step"])
    return EPLBConfig(**fields)


def _from_json(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise InvalidConfig("eplb_config", text[:200], f"a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise InvalidConfig("eplb_config", text[:200], 'a JSON object, such as {"window_size": 1000}')
    return value
