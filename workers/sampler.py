"""From logits to tokens. Parameter names and their meaning are vLLM's.

Order of operations: log probabilities are taken of the raw logits; stop ids are masked below ``min_tokens``; penalties;
temperature; min-p; top-k; top-p; then Gumbel-max with noise that is a pure function of (seed, index, position).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.messages import LogprobEntry
from drumline.workers.noise import gumbel_noise

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Below this a temperature means greedy, as in vLLM.
GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class SamplingRows:
    """Parameters of the rows that sample in a step, one entry per row of the logits.

    ``seed`` uint64, ``index`` and ``position`` int64 (tokens generated before this one), ``temperature``, ``top_p``,
    ``min_p`` and the penalties float32, ``top_k`` int32 (0 is off), ``min_tokens`` and ``logprobs`` int32 (-1 is off).
    ``stop_token_ids``: of each row. ``history``: for the rows with penalties, in order.
    """

    seed: Array
    index: Array
    position: Array
    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    min_tokens: Array
    logprobs: Array
    stop_token_ids: list[tuple[int, ...]]
    history: TokenHistory | None = None

    def penalised(self) -> Array:
        """Which entries have a penalty, int64, ascending."""
        neutral = (self.repetition_penalty == 1.0) & (self.presence_penalty == 0.0) & (self.frequency_penalty == 0.0)
        return np.flatnonzero(~neutral)


@dataclass(slots=True, frozen=True)
class TokenHistory:
    """Tokens so far, padded: ``tokens`` int64 (rows, longest); ``known`` and ``generated`` bool of the same shape."""

    tokens: Tensor
    known: Tensor
    generated: Tensor


@dataclass(slots=True, frozen=True)
class Sampled:
    """``tokens``: int64 (rows,) on the device. ``logprob_rows``: which rows asked, with their entries."""

    tokens: Tensor
    logprob_rows: Array
    logprobs: tuple[LogprobEntry, ...]


def sample(logits: Tensor, rows: SamplingRows) -> Sampled:
    """Sample one token per row of float32 ``logits`` (rows, vocabulary), which is overwritten."""
    asked = np.flatnonzero(rows.logprobs >= 0)
    raw = logits[_on(asked, logits)].log_softmax(-1) if len(asked) else None
    _mask_below_min_tokens(logits, rows)
    penalised = rows.penalised()
    if len(penalised) and rows.history is not None:
        _penalise(logits, rows, penalised, rows.history)
    tokens = _choose(logits, rows)
    if raw is None:
        return Sampled(tokens, asked, ())
    return Sampled(tokens, asked, _logprobs(raw, tokens[_on(asked, logits)], rows.logprobs[asked]))


def _on(indices: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices)).to(like.device)


def _column(values: Array, rows: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(values[rows]).to(like.device).unsqueeze(1)


def _mask_below_min_tokens(logits: Tensor, rows: SamplingRows) -> None:
    early = np.flatnonzero(rows.position < rows.min_tokens)
    places = [
        (row, token) for row in early.tolist() for token in rows.stop_token_ids[row] if 0 <= token < logits.shape[1]
    ]
    if places:
        at = torch.tensor(places, device=logits.device)
        logits[at[:, 0], at[:, 1]] = float("-inf")


def _penalise(logits: Tensor, rows: SamplingRows, penalised: Array, history: TokenHistory) -> None:
    """Repetition over prompt and output, then frequency and presence over the output."""
    at = _on(penalised, logits)
    chosen = logits[at]
    counts = torch.zeros_like(chosen)
    seen = counts.scatter_add(1, history.tokens, history.known.to(chosen.dtype)) > 0
    counts.scatter_add_(1, history.tokens, history.generated.to(chosen.dtype))
    repetition = _column(rows.repetition_penalty, penalised, logits)
    repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    chosen = torch.where(seen, repeated, chosen)
    chosen -= _column(rows.frequency_penalty, penalised, logits) * counts
    chosen -= _column(rows.presence_penalty, penalised, logits) * (counts > 0)
    logits[at] = chosen


def _choose(logits: Tensor, rows: SamplingRows) -> Tensor:
    greedy = rows.temperature < GREEDY_BELOW
    if greedy.all():
        return logits.argmax(-1)
    random = np.flatnonzero(~greedy)
    at = _on(random, logits)
    every = len(random) == len(greedy)
    scores = (logits if every else logits[at]).div_(_column(rows.temperature, random, logits))
    _keep_min_p(scores, rows.min_p[random])
    _keep_top(scores, rows.top_k[random], rows.top_p[random])
    scores += gumbel_noise(rows.seed[random], rows.index[random], rows.position[random], scores.shape[1], scores.device)
    drawn = scores.argmax(-1)
    if every:
        return drawn
    tokens = logits.argmax(-1)
    tokens[at] = drawn
    return tokens


def _keep_min_p(scores: Tensor, min_p: Array) -> None:
    """Drop tokens less likely than min_p times the likeliest, per row."""
    some = np.flatnonzero(min_p > 0)
    if len(some):
        at = _on(some, scores)
        chosen = scores[at]
        floor = chosen.amax(-1, keepdim=True) + _column(min_p, some, scores).log()
        scores[at] = chosen.masked_fill_(chosen < floor, float("-inf"))


def _keep_top(scores: Tensor, top_k: Array, top_p: Array) -> None:
    """Keep the top_k best, then of those the fewest whose probabilities reach top_p. Ties at the edge stay."""
    vocabulary = scores.shape[1]
    limit = np.where((top_k <= 0) | (top_k > vocabulary), vocabulary, top_k)
    some = np.flatnonzero((limit < vocabulary) | (top_p < 1.0))
    if not len(some):
        return
    at = _on(some, scores)
    chosen = scores[at]
    widest = int(limit[some].max())
    best = chosen.sort(-1, descending=True).values if widest == vocabulary else chosen.topk(widest, dim=-1).values
    edge = best.gather(1, _column(limit.astype(np.int64) - 1, some, scores))
    probabilities = best.masked_fill(best < edge, float("-inf")).softmax(-1)
    # A token stays while what stands before it has not reached top_p; so the likeliest always stays.
    before = probabilities.cumsum(-1) - probabilities
    share = _column(top_p, some, scores)
    stays = (before < share) | (share >= 1.0)  # the sum of all may round to more than 1
    stays[:, 0] = True
    last = stays.sum(-1, keepdim=True) - 1
    edge = torch.maximum(edge, best.gather(1, last))
    scores[at] = chosen.masked_fill_(chosen < edge, float("-inf"))


def _logprobs(raw: Tensor, tokens: Tensor, asked: Array) -> tuple[LogprobEntry, ...]:
    """Entries of the rows that asked; ``raw`` (rows, vocabulary) are log probabilities of the model itself."""
    own = raw.gather(1, tokens.unsqueeze(1))
    ranks = ((raw > own).sum(-1) + 1).tolist()
    widest = min(int(asked.max()), raw.shape[1])
    values, ids = raw.topk(widest, dim=-1) if widest else (raw[:, :0], raw[:, :0])
    top_values = values.cpu().numpy().astype(np.float32)
    top_ids = ids.cpu().numpy().astype(np.int32)
    return tuple(
        LogprobEntry(token, logprob, rank, top_ids[i, : asked[i]], top_values[i, : asked[i]])
        for i, (token, logprob, rank) in enumerate(zip(tokens.tolist(), own[:, 0].tolist(), ranks, strict=True))
    )
