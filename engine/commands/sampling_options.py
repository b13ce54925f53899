"""The flags that say how to sample, under vLLM's names, and what they make of :class:`SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--max-tokens", type=int, metavar="N", help="Longest output in tokens; default: 16."),
    click.option("--min-tokens", type=int, metavar="N", help="Shortest output in tokens; default: 0."),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy; default: 1.0."),
    click.option("--top-p", type=float, metavar="P", help="Keep the best tokens up to this probability; default: 1.0."),
    click.option("--top-k", type=int, metavar="K", help="Keep the best K tokens; default: 0, off."),
    click.option("--min-p", type=float, metavar="P", help="Least probability relative to the best; default: 0.0."),
    click.option("--presence-penalty", type=float, metavar="F", help="-2 to 2; default: 0."),
    click.option("--frequency-penalty", type=float, metavar="F", help="-2 to 2; default: 0."),
    click.option("--repetition-penalty", type=float, metavar="F", help="Above 0; default: 1.0, off."),
    click.option("--n", type=int, metavar="N", help="Outputs per prompt; default: 1."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the output before TEXT; may be repeated."),
    click.option(
        "--stop-token-ids", type=int, multiple=True, metavar="ID", help="End the output at this token; may be repeated."
    ),
    click.option("--include-stop-str-in-output", is_flag=True, default=None, help="Keep the stop string in the text."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the end-of-sequence token."),
    click.option("--logprobs", type=int, metavar="N", help="Report the best N tokens at each position (with --json)."),
]
SAMPLING_OPTIONS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logprobs",
)


def sampling_options(command: F) -> F:
    """Adds the flags to a command, which gets them as keyword arguments; what was not given is None or ()."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sampling_fields(flags: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The fields of SamplingParams that were given."""
    fields = {name: flags[name] for name in SAMPLING_OPTIONS if flags[name] not in (None, ())}
    return fields if seed is None else {**fields, "seed": seed}
