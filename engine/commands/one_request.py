"""One request of ``drumline generate``, from prompt to the records that are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from drumline.engine.client import AsyncEngine
from drumline.engine.errors import DrumlineError
from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams


class Prompt(msgspec.Struct, frozen=True):
    """What to continue: text or token ids, under which id, and how."""

    request_id: str
    prompt: str | list[int]
    params: SamplingParams


async def run_request(
    engine: AsyncEngine, request: Prompt, on_output: Callable[[RequestOutput], None] | None = None
) -> list[dict[str, Any]]:
    """One record per output index, as ``--json`` and output files hold them. Raises what ``generate`` raises.

    ``ttft_s`` and ``latency_s`` are seconds from the submission to the first token and to the end of that output.
    """
    began = time.monotonic()
    first: dict[int, float] = {}
    records: dict[int, dict[str, Any]] = {}
    async for out in engine.generate(request.prompt, request.params, request_id=request.request_id):
        now = time.monotonic() - began
        if out.token_ids:
            first.setdefault(out.index, now)
        if on_output is not None:
            on_output(out)
        if out.finished:
            records[out.index] = _record(out, first.get(out.index), now)
    return [record for _, record in sorted(records.items())]


def _record(out: RequestOutput, ttft_s: float | None, latency_s: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "request_id": out.request_id,
        "index": out.index,
        "prompt": out.prompt,
        "prompt_token_ids": out.prompt_token_ids,
        "token_ids": out.token_ids,
        "text": out.text,
        "finish_reason": out.finish_reason,
        "stop_reason": out.stop_reason,
        "num_cached_tokens": out.num_cached_tokens,
        "ttft_s": None if ttft_s is None else round(ttft_s, 6),
        "latency_s": round(latency_s, 6),
    }
    if out.logprobs is not None:
        record["logprobs"] = [
            [{"token_id": token, **msgspec.structs.asdict(entry)} for token, entry in position.items()]
            for position in out.logprobs
        ]
    return record


def error_record(error: DrumlineError) -> dict[str, Any]:
    """A typed error as it stands in an output file."""
    info = error.info
    shown: dict[str, Any] = {"kind": info.kind, "text": info.text, "retryable": info.retryable}
    for name in ("field", "found", "valid"):
        if getattr(info, name):
            shown[name] = getattr(info, name)
    if info.rank >= 0:
        shown["rank"] = info.rank
    return shown


class Tally:
    """Generated tokens and the time in which they were generated."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.tokens = 0
        self.generating_from = self.began

    def generating(self) -> None:
        """The engine is ready: tokens are counted from here on."""
        self.generating_from = time.monotonic()

    def count(self, records: list[dict[str, Any]]) -> None:
        """Add the tokens of a request's ``records``, as :func:`run_request` returns them."""
        self.tokens += sum(len(record["token_ids"]) for record in records)

    def timings(self, start_s: float) -> dict[str, float]:
        """``start_s``: until the engine was ready. ``total_s``: everything. ``tokens_per_s``: after the start."""
        now = time.monotonic()
        spent = max(now - self.generating_from, 1e-9)
        return {
            "start_s": round(start_s, 6),
            "total_s": round(now - self.began, 6),
            "tokens_per_s": round(self.tokens / spent, 3),
        }
