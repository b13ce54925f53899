"""Equal streams, ties and differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing.equal import Sequence, compare
from drumline.engine.testing.noise import gumbel
from drumline.workers.noise import gumbel_noise

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.5, seed=7)


def greedy(*tokens: int, logprob: float = -1.0) -> Sequence:
    return Sequence(tokens, (-0.5,) * (len(tokens) - 1) + (logprob,), "length")


def test_the_noise_is_the_one_that_ranks_add() -> None:
    seeds, indices, positions = [7, (1 << 63) - 1, 0], [0, 3, 1], [0, 1000, 77]
    rows = gumbel_noise(np.array(seeds), np.array(indices), np.array(positions), 500, torch.device("cpu"))
    for row, (seed, index, position) in enumerate(zip(seeds, indices, positions, strict=True)):
        ours = [gumbel(seed, index, position, token) for token in range(500)]
        np.testing.assert_allclose(rows[row].numpy(), ours, rtol=2e-6, atol=2e-6)


def test_the_same_tokens_are_equal() -> None:
    found = compare(greedy(1, 2, 3), greedy(1, 2, 3, logprob=-9.0), GREEDY)
    assert (found.same, found.equal, found.tie, found.position) == (True, True, False, -1)


@pytest.mark.parametrize(("logprob", "tie"), [(-1.00005, True), (-1.0002, False)])
def test_a_difference_is_a_tie_when_the_candidates_are_as_likely(logprob: float, tie: bool) -> None:
    found = compare(greedy(1, 2), greedy(1, 3, logprob=logprob), GREEDY)
    assert (found.same, found.equal, found.tie, found.position) == (False, tie, tie, 1)


def test_what_follows_a_tie_is_not_compared() -> None:
    first, second = Sequence((1, 2, 9), (-1.0, -1.0, -1.0)), Sequence((1, 3, 8), (-1.0, -1.0, -7.0))
    assert compare(first, second, GREEDY).tie


def test_the_noise_decides_between_sampled_candidates() -> None:
    gap = gumbel(7, 2, 0, 20) - gumbel(7, 2, 0, 10)
    first, second = Sequence((10,), (-1.0,)), Sequence((20,), (-1.0 - 0.5 * gap,))
    assert compare(first, second, SAMPLED, index=2).tie
    assert not compare(first, second, SAMPLED, index=1).equal
    assert not compare(first, second, GREEDY, index=2).equal


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (greedy(1, 2, 3), greedy(1, 2)),
        (greedy(1, 2), greedy(1, 2, 3)),
        (Sequence((1,), (), "length"), Sequence((2,), (), "length")),
        (Sequence((1,), (-1.0,), "length"), Sequence((1,), (-1.0,), "stop")),
    ],
    ids=["cut short", "too long", "without logprobs", "another end"],
)
def test_anything_else_is_different(expected: Sequence, found: Sequence) -> None:
    assert not compare(expected, found, GREEDY).equal


def test_what_penalties_take_away_belongs_to_the_score() -> None:
    penalised = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    first, second = Sequence((2, 2, 2), (-1.0, -1.0, -1.0)), Sequence((2, 2, 3), (-1.0, -1.0, -2.0))
    assert compare(first, second, penalised).tie
    assert not compare(first, second, GREEDY).equal


def test_with_a_repetition_penalty_only_the_same_is_equal() -> None:
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.1)
    assert not compare(greedy(1, 2), greedy(1, 3), penalised).equal
    assert compare(greedy(1, 2), greedy(1, 2), penalised).equal
