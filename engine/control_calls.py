"""Control calls to the ranks on the client's side: what may be asked, and what was answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from drumline.engine.outputs import RankReply
from drumline.engine.prompts import lone_surrogate
from drumline.protocol.errors import ErrorInfo, InvalidRequest
from drumline.protocol.messages import RankAnswer

MAX_ARGS_BYTES = 1 << 20
DEFAULT_TIMEOUT_S = 5.0


def check_method(method: object) -> str:
    """A name that a message can carry. Raises :class:`InvalidRequest`."""
    if not isinstance(method, str) or lone_surrogate(method) is not None:
        raise InvalidRequest("method", ascii(method), "the name of a control call")
    return method


def check_timeout(timeout: object) -> float:
    """Seconds to wait for every rank. Raises :class:`InvalidRequest`."""
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InvalidRequest("timeout", timeout, "seconds, above 0")
    return float(timeout)


def pack_arguments(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bytes:
    """Arguments as they travel; nothing for none. Raises :class:`InvalidRequest`."""
    if not args and not kwargs:
        return b""
    try:
        packed = msgspec.msgpack.encode((tuple(args), dict(kwargs or {})))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest("args", str(error), "values that msgpack can carry") from None
    if len(packed) > MAX_ARGS_BYTES:
        raise InvalidRequest("args", f"{len(packed)} bytes", f"at most {MAX_ARGS_BYTES} bytes of msgpack")
    return packed


def rank_reply(answer: RankAnswer) -> RankReply:
    """What one rank answered, decoded."""
    try:
        value = msgspec.msgpack.decode(answer.value) if answer.value else None
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        text = f"the reply of rank {answer.rank} does not decode: {error}"
        return RankReply(answer.rank, ok=False, error=ErrorInfo(kind="protocol", text=text, rank=answer.rank))
    return RankReply(answer.rank, answer.ok, value, answer.error)
