"""How the tokens of a request are chosen and when it ends. Names, meanings and defaults are vLLM's."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from drumline.protocol.errors import InvalidRequest
from drumline.protocol.messages import SamplingSpec

MAX_LOGPROBS = 20
_GREEDY_BELOW = 1e-5
_INT32_MAX = 2**31 - 1


class NotServed(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's names that have no work behind them here yet. Any value but the default is refused by name."""

    allowed_token_ids: Any = None
    bad_words: Any = None
    best_of: Any = None
    extra_args: Any = None
    flat_logprobs: Any = None
    guided_decoding: Any = None
    logit_bias: Any = None
    logits_processors: Any = None
    output_kind: Any = None
    prompt_logprobs: Any = None
    spaces_between_special_tokens: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None


# What vLLM's own defaults are, where None is not the only way to say "off".
_OFF: dict[str, tuple[Any, ...]] = {
    "bad_words": ([], ()),
    "best_of": (1,),
    "flat_logprobs": (False,),
    "logit_bias": ({},),
    "logits_processors": ([], ()),
    "spaces_between_special_tokens": (True,),
}


class SamplingParams(NotServed, frozen=True, repr_omit_defaults=True):
    """Sampling parameters of one request. Raises :class:`InvalidRequest` with field, found and valid.

    ``n``: independent sequences per prompt, told apart by ``RequestOutput.index``. ``temperature`` 0 is greedy;
    ``top_k`` 0 (or -1) is off, ``top_p`` 1 is off, ``min_p`` 0 is off. ``seed``: fixes the noise of the request,
    whatever runs beside it; without one the engine draws one. ``stop``: strings that end a sequence; they are not part
    of its text unless ``include_stop_str_in_output``. ``stop_token_ids`` end it too; ``ignore_eos`` goes on past the
    model's end-of-sequence token. ``min_tokens``: before so many tokens nothing but a length ends the sequence.
    ``max_tokens``: None goes on up to the context. ``logprobs``: None, or how many of the best tokens to report at each
    position beside the sampled one, 0 to 20. ``detokenize`` False: text is "". ``skip_special_tokens``: leave special
    tokens out of the text.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field in NotServed.__struct_fields__:
            value = getattr(self, field)
            if value is not None and value not in _OFF.get(field, ()):
                raise InvalidRequest(field, value, "None: this version does not serve it")
        self._check_numbers()
        self._check_stops()
        for field in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise InvalidRequest(field, value, "true or false")
        self._check_together()

    def _check_numbers(self) -> None:
        self._whole("n", 1, 4096)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.0, math.inf, open_low=True)
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._whole("top_k", -1, _INT32_MAX, "0 or -1 (off), or how many tokens to keep")
        self._number("min_p", 0.0, 1.0)
        self._whole("min_tokens", 0, _INT32_MAX)
        if self.seed is not None:
            self._whole("seed", -(2**63), 2**63 - 1, "None, or a whole number of 64 bits with sign")
        if self.max_tokens is not None:
            self._whole("max_tokens", 1, _INT32_MAX, "None (up to the context), or at least 1")
        if self.logprobs is not None:
            self._whole("logprobs", 0, MAX_LOGPROBS, f"None, or 0 to {MAX_LOGPROBS}")

    def _check_stops(self) -> None:
        stop = self.stop
        if isinstance(stop, str):
            stop = (stop,)
        elif stop is None:
            stop = ()
        elif not _is_list_of_text(stop):
            raise InvalidRequest("stop", stop, "a string or a list of strings")
        if any(not text for text in stop):
            raise InvalidRequest("stop", list(stop), "strings that are not empty")
        msgspec.structs.force_setattr(self, "stop", tuple(dict.fromkeys(stop)))
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        msgspec.structs.force_setattr(self, "stop_token_ids", _token_ids(ids))

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.is_greedy and self.n > 1:
            raise InvalidRequest("n", self.n, "1 while temperature is 0: greedy sequences would all be the same")
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop", list(self.stop), "no stop strings while detokenize is false")

    def _whole(self, field: str, low: int, high: int, valid: str | None = None) -> None:
        value = getattr(self, field)
        whole = _as_whole(value)
        if whole is None or not low <= whole <= high:
            raise InvalidRequest(field, value, valid or f"a whole number, {low} to {high}")
        msgspec.structs.force_setattr(self, field, whole)

    def _number(self, field: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, field)
        number = _as_number(value)
        if number is None or not low <= number <= high or (open_low and number == low):
            start = f"above {low:g}" if open_low else f"at least {low:g}"
            raise InvalidRequest(field, value, start if high == math.inf else f"a number {start}, at most {high:g}")
        msgspec.structs.force_setattr(self, field, number)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one."""
        return self.temperature < _GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as it was normalised: a tuple, without repeats."""
        return tuple(self.stop or ())

    @property
    def has_seed(self) -> bool:
        """Whether the noise is fixed by the user; -1 means no seed, as in vLLM."""
        return self.seed is not None and self.seed != -1

    def to_spec(self) -> SamplingSpec:
        """What the engine is told. Filters are switched off where greedy sampling makes them idle."""
        greedy = self.is_greedy
        return SamplingSpec(
            seed=self.seed if self.seed is not None and self.has_seed else 0,
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else max(self.top_k, 0),
            min_p=0.0 if greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Parameters from names and values, as read from JSON. An unknown name raises :class:`InvalidRequest`."""
        for name in fields:
            if name not in cls.__struct_fields__:
                raise InvalidRequest(name, fields[name], "one of " + ", ".join(SERVED_FIELDS))
        return cls(**fields)


SERVED_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name not in NotServed.__struct_fields__)


def _as_whole(value: object) -> int | None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def _as_number(value: object) -> float | None:
    """Any real number (numpy's too) as a finite float, else None."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(text, str) for text in value)


def _token_ids(ids: object) -> tuple[int, ...]:
    whole = [_as_whole(item) for item in ids] if isinstance(ids, Sequence) and not isinstance(ids, str) else [None]
    if any(item is None or not 0 <= item <= _INT32_MAX for item in whole):
        raise InvalidRequest("stop_token_ids", ids, "a list of token ids")
    return tuple(dict.fromkeys(item for item in whole if item is not None))
