"""What a submission must look like. A peer may send anything, so nothing here leans on the client library."""

from __future__ import annotations

import math

import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.protocol.errors import InvalidRequest
from drumline.protocol.messages import SamplingSpec, Submit

INT32_MAX = 2**31 - 1
MAX_LOGPROBS = 20
MAX_ID_LENGTH = 1024


def check_submit(config: CoreConfig, msg: Submit, max_kv_tokens: int) -> None:
    """``max_kv_tokens``: how many tokens the KV blocks of the largest replica that may serve the request hold.

    Raises :class:`InvalidRequest` that names the field, what was found and what is valid.
    """
    if not 0 < len(msg.request_id) <= MAX_ID_LENGTH:
        raise InvalidRequest("request_id", f"{len(msg.request_id)} characters", f"1 to {MAX_ID_LENGTH} characters")
    _check_prompt(config, msg, max_kv_tokens)
    _whole("n", msg.n, 1, config.max_waiting)
    _whole("max_tokens", msg.max_tokens, 1, INT32_MAX)
    _whole("priority", msg.priority, -INT32_MAX, INT32_MAX)
    _check_sampling(config, msg.sampling)
    if msg.sampling.min_tokens > msg.max_tokens:
        raise InvalidRequest("min_tokens", msg.sampling.min_tokens, f"at most max_tokens ({msg.max_tokens})")


def check_rank(config: CoreConfig, rank: int) -> None:
    """The engine replica that a request asks for; -1 leaves the choice to the router."""
    _whole("data_parallel_rank", rank, -1, config.data_parallel_size - 1)


def _check_prompt(config: CoreConfig, msg: Submit, max_kv_tokens: int) -> None:
    prompt = msg.prompt
    if prompt.ndim != 1 or len(prompt) == 0:
        raise InvalidRequest("prompt", f"an array of shape {prompt.shape}", "at least one token id")
    if len(prompt) > config.max_prompt_tokens:
        valid = f"at most {config.max_prompt_tokens} tokens (max_model_len {config.max_model_len} less one to generate)"
        raise InvalidRequest("prompt", f"{len(prompt)} tokens", valid)
    if len(prompt) > max_kv_tokens:
        blocks = max_kv_tokens // config.block_size
        valid = f"at most {max_kv_tokens} tokens ({blocks} KV blocks of {config.block_size})"
        raise InvalidRequest("prompt", f"{len(prompt)} tokens", valid)
    if prompt.view(np.uint32).max() >= config.vocab_size:
        wrong = np.flatnonzero((prompt < 0) | (prompt >= config.vocab_size))[0]
        raise InvalidRequest("prompt", f"token id {prompt[wrong]} at {wrong}", f"0 to {config.vocab_size - 1}")


def _check_sampling(config: CoreConfig, sampling: SamplingSpec) -> None:
    _whole("seed", sampling.seed, -(2**63), 2**63 - 1)
    _number("temperature", sampling.temperature, 0.0, math.inf)
    _number("top_p", sampling.top_p, 0.0, 1.0, above=True)
    _whole("top_k", sampling.top_k, -1, INT32_MAX)
    _number("min_p", sampling.min_p, 0.0, 1.0)
    _number("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf, above=True)
    _number("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _whole("min_tokens", sampling.min_tokens, 0, INT32_MAX)
    _whole("logprobs", sampling.logprobs, -1, MAX_LOGPROBS)
    if len(sampling.stop_token_ids) > config.vocab_size:
        raise InvalidRequest("stop_token_ids", f"{len(sampling.stop_token_ids)} ids", f"at most {config.vocab_size}")
    for token in sampling.stop_token_ids:
        _whole("stop_token_ids", token, 0, config.vocab_size - 1)


def _whole(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(field, value, f"{low} to {high}")


def _number(field: str, value: float, low: float, high: float, above: bool = False) -> None:
    if not (math.isfinite(value) and low <= value <= high and not (above and value == low)):
        start = f"above {low:g}" if above else f"at least {low:g}"
        raise InvalidRequest(field, value, start if high == math.inf else f"{start}, at most {high:g}")
