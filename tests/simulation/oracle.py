"""What a correct engine generates, computed from the request alone.

A prefix has a 63-bit hash; a KV slot remembers the hash of the prefix that was written there; the next token is a
function of that hash, of the seed and of the index. So a single stale, foreign or missing slot, or a wrong seed,
changes or betrays the output.
"""

from __future__ import annotations

from dataclasses import dataclass

_MASK = (1 << 63) - 1
EMPTY = 0x1234567


def extend(prefix: int, token: int) -> int:
    """The hash of a prefix that goes on with ``token``."""
    mixed = ((prefix ^ (token + 1) * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ (mixed >> 29)


def next_token(prefix: int, seed: int, index: int, vocab_size: int) -> int:
    """The token that follows a prefix."""
    mixed = ((prefix + seed * 31 + index * 0x2545F491) * 0x94D049BB133111EB) & _MASK
    return (mixed >> 17) % vocab_size


@dataclass(frozen=True)
class Expected:
    """The whole output of one sequence that nobody stops, and how it ends."""

    tokens: tuple[int, ...]
    reason: str
    stop_token: int


def expected_output(
    prompt: list[int], seed: int, index: int, stops: frozenset[int], min_tokens: int, max_tokens: int, vocab_size: int
) -> Expected:
    """``max_tokens``: what is left after every limit."""
    prefix = EMPTY
    for token in prompt:
        prefix = extend(prefix, token)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = next_token(prefix, seed, index, vocab_size)
        tokens.append(token)
        if token in stops and len(tokens) > min_tokens:
            return Expected(tuple(tokens), "stop", token)
        prefix = extend(prefix, token)
    return Expected(tuple(tokens), "length", -1)
