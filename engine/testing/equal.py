"""Whether a stream is equal to what it should have been.

Equal are the same tokens; or, where two streams first differ, candidates whose scores, noise included, are less than
1e-4 apart: sums of floats in another order decide between such. These are ties, to be counted and few.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import msgspec

from drumline.engine.outputs import RequestOutput
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.noise import gumbel

TIE_BELOW = 1e-4


class Sequence(msgspec.Struct, frozen=True):
    """One sequence as it was read. ``logprobs``: of each of its tokens; empty when they were not asked for."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> Sequence:
        """From the last output of a sequence; SamplingParams(logprobs=0) is enough to decide ties."""
        tokens = tuple(output.token_ids)
        entries = output.logprobs or []
        logprobs = tuple(entry[token].logprob for token, entry in zip(tokens, entries, strict=False))
        return cls(tokens, logprobs, output.finish_reason)


class Comparison(msgspec.Struct, frozen=True):
    """``same``: equal token for token, and ended alike. ``position``: of the first difference, -1 without one.
    ``margin``: between the two candidates there, None where it cannot be known: no logprobs, or one has ended."""

    same: bool
    position: int = -1
    margin: float | None = None

    @property
    def tie(self) -> bool:
        """Whether they differ, and only by a tie."""
        return self.margin is not None and self.margin < TIE_BELOW

    @property
    def equal(self) -> bool:
        """Whether they are equal: the same, or apart by a tie."""
        return self.same or self.tie

    def __str__(self) -> str:
        if self.same:
            return "the same"
        margin = "unknown" if self.margin is None else f"{self.margin:.2e}"
        return f"{'a tie' if self.tie else 'different'} at position {self.position}, margin {margin}"


def compare(expected: Sequence, found: Sequence, params: SamplingParams, index: int = 0) -> Comparison:
    """Compare two runs of the same request. A repetition penalty goes by logits, which are not known: with one, only
    the same is equal."""
    position = _first_difference(expected.tokens, found.tokens)
    if position < 0:
        return Comparison(expected.finish_reason == found.finish_reason)
    if not position < min(len(expected.logprobs), len(found.logprobs)) or params.repetition_penalty != 1.0:
        return Comparison(False, position)
    margin = abs(_score(expected, position, params, index) - _score(found, position, params, index))
    return Comparison(False, position, margin)


def _first_difference(first: SequenceOf[int], second: SequenceOf[int]) -> int:
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return -1 if len(first) == len(second) else min(len(first), len(second))


def _score(sequence: Sequence, position: int, params: SamplingParams, index: int) -> float:
    """Of the token at ``position``, up to what all tokens of a row have in common."""
    token = sequence.tokens[position]
    times = sequence.tokens[:position].count(token)
    score = sequence.logprobs[position] - params.frequency_penalty * times - params.presence_penalty * (times > 0)
    if params.is_greedy or params.seed is None:
        return score
    return score / params.temperature + gumbel(params.seed, index, position, token)
