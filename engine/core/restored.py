"""A request that a coordinator takes over from the one before it."""

from __future__ import annotations

import msgspec

from drumline.protocol.messages import I32, LogprobEntry, StreamEnd, Submit


class RestoredRequest(msgspec.Struct, frozen=True):
    """A request as a journal knows it, or as :meth:`EngineCore.snapshot` tells it for one.

    ``submit``: as it was submitted, with the seed that was drawn and ``seed_given`` set. ``first_handle``: index i of
    its ``n`` sequences has the stream handle ``first_handle + i``. ``tokens[index]``: int32, every generated token so
    far; ``logprobs[index]``: theirs, in order, empty where none were asked for; ``ends[index]``: how the sequence
    ended, None while it has not.
    """

    submit: Submit
    first_handle: int
    tokens: tuple[I32, ...]
    logprobs: tuple[tuple[LogprobEntry, ...], ...]
    ends: tuple[StreamEnd | None, ...]
