"""From what an app passes to ``generate`` to what is submitted, checked against the model that is served."""

from __future__ import annotations

import asyncio
import operator
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from drumline.engine.sampling_params import SERVED_FIELDS, SamplingParams
from drumline.protocol.errors import InvalidConfig, InvalidRequest
from drumline.protocol.messages import I32, ModelInfo, Submit

LONGEST_REQUEST_ID = 256
_ENCODE_IN_THREAD = 50_000
_INT32_MAX = 2**31 - 1
MAX_PARAMS_BYTES = 256 << 10
_DEFAULTS = {name: getattr(SamplingParams(), name) for name in SERVED_FIELDS}


def load_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with padding and truncation off: a prompt is never cut in silence."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise InvalidConfig("tokenizer", str(error), "a tokenizer.json of the tokenizers library") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


async def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, info: ModelInfo) -> list[int]:
    """Token ids of ``prompt``. Raises :class:`InvalidRequest` when it is empty, no text or ids, or out of range."""
    if isinstance(prompt, str):
        if tokenizer is None:
            valid = "a list of token ids: the model folder has no tokenizer.json"
            raise InvalidRequest("prompt", "text", valid)
        ids = await _encode(prompt, tokenizer)
    else:
        ids = _whole_numbers(prompt)
    if not ids:
        raise InvalidRequest("prompt", "no tokens", "at least one token")
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= info.vocab_size:
        found = lowest if lowest < 0 else highest
        raise InvalidRequest("prompt", f"token id {found}", f"token ids 0 to {info.vocab_size - 1}")
    return ids


async def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    if (place := lone_surrogate(prompt)) is not None:
        raise InvalidRequest("prompt", f"a lone surrogate at character {place}", "text that is Unicode")
    if len(prompt) > _ENCODE_IN_THREAD:
        # A batch, because only that lets go of the interpreter's lock; the loop would stand still for seconds.
        (encoded,) = await asyncio.to_thread(tokenizer.encode_batch, [prompt])
        return list(encoded.ids)
    return list(tokenizer.encode(prompt).ids)


def _whole_numbers(prompt: object) -> list[int]:
    """A caller may ignore the annotations: anything can come here."""
    valid = "a string, or a list of token ids"
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
        raise InvalidRequest("prompt", type(prompt).__name__, valid)
    ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(ids, Sequence):
        raise InvalidRequest("prompt", "an array without a dimension", valid)
    try:
        if any(isinstance(item, bool) for item in ids):
            raise TypeError
        return [operator.index(item) for item in ids]
    except TypeError:
        wrong = next(type(item).__name__ for item in ids if isinstance(item, bool) or not hasattr(item, "__index__"))
        raise InvalidRequest("prompt", f"a {wrong} among the token ids", valid) from None


def check_request_id(request_id: object) -> None:
    """Raises :class:`InvalidRequest` for anything but text that travels in a message and is not too long."""
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= LONGEST_REQUEST_ID:
        raise InvalidRequest("request_id", request_id, f"a string of 1 to {LONGEST_REQUEST_ID} characters")
    if (place := lone_surrogate(request_id)) is not None:
        raise InvalidRequest("request_id", f"a lone surrogate at character {place}", "text that is Unicode")


def lone_surrogate(text: str) -> int | None:
    """Where ``text`` holds a surrogate without its partner, which no message can carry; None when it holds none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def submit_message(
    request_id: str,
    ids: list[int],
    params: SamplingParams,
    info: ModelInfo,
    *,
    priority: int,
    data_parallel_rank: int | None,
    durable: bool = False,
) -> Submit:
    """The Submit of a request, with call id 0 and a nonce of its own. ``durable``: it outlives its connection. Raises
    :class:`InvalidRequest` for what does not fit the model."""
    if len(ids) >= info.max_model_len:
        # The engine checks this too, and more; but a frame beyond its limit would end the whole connection.
        valid = f"at most {info.max_model_len - 1} tokens (max_model_len {info.max_model_len} less one to generate)"
        raise InvalidRequest("prompt", f"{len(ids)} tokens", valid)
    stop_ids = tuple(params.stop_token_ids or ())
    if stop_ids and max(stop_ids) >= info.vocab_size:
        raise InvalidRequest("stop_token_ids", max(stop_ids), f"token ids 0 to {info.vocab_size - 1}")
    if params.stop_strings and not info.has_tokenizer:
        raise InvalidRequest(
            "stop", list(params.stop_strings), "no stop strings: the model folder has no tokenizer.json"
        )
    if not _is_whole(priority, -_INT32_MAX, _INT32_MAX):
        raise InvalidRequest("priority", priority, f"a whole number, {-_INT32_MAX} to {_INT32_MAX}; lower runs first")
    if data_parallel_rank is not None and not _is_whole(data_parallel_rank, 0, info.data_parallel_size - 1):
        valid = f"None, or 0 to {info.data_parallel_size - 1}"
        raise InvalidRequest("data_parallel_rank", data_parallel_rank, valid)
    prompt: I32 = np.array(ids, dtype=np.int32)
    room = max(1, info.max_model_len - len(ids))
    return Submit(
        call_id=0,
        request_id=request_id,
        prompt=prompt,
        sampling=params.to_spec(),
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        n=params.n,
        seed_given=params.has_seed,
        ignore_eos=params.ignore_eos,
        priority=priority,
        data_parallel_rank=-1 if data_parallel_rank is None else data_parallel_rank,
        nonce=uuid.uuid4().hex,
        durable=durable,
        client_params=_as_bytes(params),
    )


def _as_bytes(params: SamplingParams) -> bytes:
    """``params`` for whoever reads the request later, without what has its default."""
    told = {name: getattr(params, name) for name in SERVED_FIELDS if getattr(params, name) != _DEFAULTS[name]}
    try:
        content = msgspec.json.encode(told)
    except UnicodeEncodeError as error:
        raise InvalidRequest("stop", "a lone surrogate", "strings that are Unicode") from error
    if len(content) > MAX_PARAMS_BYTES:
        raise InvalidRequest("params", f"{len(content)} bytes", f"at most {MAX_PARAMS_BYTES} bytes as JSON")
    return content


def params_from_bytes(content: bytes) -> SamplingParams:
    """What :func:`submit_message` told of the parameters. Raises :class:`InvalidRequest` for anything else."""
    try:
        fields = msgspec.json.decode(content or b"{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest("client_params", str(error), "what this client library made") from error
    return SamplingParams.from_mapping(fields)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
