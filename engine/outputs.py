"""What an app reads from a request."""

from __future__ import annotations

import msgspec

from drumline.protocol.errors import ErrorInfo


class Logprob(msgspec.Struct, frozen=True):
    """One candidate at one position: its natural-log probability, its ``rank`` (1 is best) and its own text."""

    logprob: float
    rank: int
    decoded_token: str


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """News of one sequence of a request. One event may carry several tokens.

    ``index``: which of ``n``. ``token_ids`` and ``text`` are cumulative for this index, the deltas what this event
    adds. Text that may yet turn out to be a stop string, or half a character, is held back until it is decided.
    ``logprobs``: None unless asked for, else one dict per generated token from token id to :class:`Logprob`: the
    sampled token first, then the best in order. ``finish_reason``: None, "stop", "length" or "abort";
    ``stop_reason``: the stop string or the stop token id that ended it, None for the end-of-sequence token.
    ``num_cached_tokens``: prompt tokens taken from the prefix cache. Each index has one event that is ``finished``.
    """

    request_id: str
    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    token_ids_delta: list[int]
    text: str
    text_delta: str
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    finished: bool = False


class RankReply(msgspec.Struct, frozen=True):
    """What one rank answered to a control call; ``error`` is set where ``ok`` is false."""

    rank: int
    ok: bool
    value: object = None
    error: ErrorInfo | None = None
