"""The sampler against numbers worked out by hand and against exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.protocol.messages import SamplingSpec
from drumline.workers.sampler import Sampled, SamplingRows, TokenHistory, sample
from drumline.workers.sampling_columns import SamplingColumns

INF = float("inf")


def rows_of(*specs: SamplingSpec, position: int = 0) -> SamplingRows:
    columns = SamplingColumns(len(specs))
    for row, spec in enumerate(specs):
        columns.set(row, spec)
    rows = np.arange(len(specs))
    return columns.take(rows, np.full(len(specs), position))


def history_of(prompt: list[int], output: list[int], padded: int = 3) -> TokenHistory:
    tokens = torch.tensor([prompt + output + [0] * padded])
    places = torch.arange(tokens.shape[1])
    known = (places < len(prompt) + len(output)).unsqueeze(0)
    return TokenHistory(tokens, known, known & (places >= len(prompt)))


def draw_many(logits: list[float], count: int, **parameters: Any) -> Tensor:
    """Frequencies of ``count`` draws with as many seeds."""
    specs = [SamplingSpec(seed=seed, **parameters) for seed in range(count)]
    sampled = sample(torch.tensor([logits]).repeat(count, 1), rows_of(*specs))
    return torch.bincount(sampled.tokens, minlength=len(logits)) / count


def kept_by(logits: list[float], **parameters: Any) -> set[int]:
    return set(draw_many(logits, 2000, **parameters).nonzero().view(-1).tolist())


def test_temperature_zero_takes_the_best() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, 2.0, 1.0]])
    spec = SamplingSpec(temperature=0.0)
    assert sample(logits, rows_of(spec, spec)).tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = [2.0, 1.0, 0.5, -1.0, -3.0]
    exact = (torch.tensor(logits) / temperature).softmax(-1)
    found = draw_many(logits, 20000, temperature=temperature)
    # Five standard deviations of a binomial share.
    assert bool(((found - exact).abs() < 5 * (exact * (1 - exact) / 20000).sqrt() + 1e-4).all())


def test_draws_follow_the_softmax_that_top_k_and_top_p_leave() -> None:
    logits = [2.0, 1.5, 1.0, 0.5, 0.0]
    exact = torch.tensor(logits[:3]).softmax(-1)
    found = draw_many(logits, 20000, top_k=3)
    assert found[3:].sum() == 0
    assert bool(((found[:3] - exact).abs() < 0.02).all())


def test_top_k_keeps_the_k_best() -> None:
    assert kept_by([0.0, 0.3, 0.1, 0.2], top_k=2) == {1, 3}
    assert kept_by([0.0, 0.3, 0.1, 0.2], top_k=0) == {0, 1, 2, 3}
    assert kept_by([0.0, 0.3, 0.1, 0.2], top_k=100) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept_by(logits, top_p=0.3) == {1}
    assert kept_by(logits, top_p=0.45) == {1, 3}
    assert kept_by(logits, top_p=0.85) == {1, 2, 3}
    assert kept_by(logits, top_p=1.0) == {0, 1, 2, 3}
    assert kept_by(logits, top_p=1e-9) == {1}


def test_top_p_counts_within_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    # Of 0.4 and 0.3, the first alone is 0.571 of the mass.
    assert kept_by(logits, top_k=2, top_p=0.55) == {1}
    assert kept_by(logits, top_k=2, top_p=0.6) == {1, 3}


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept_by(logits, min_p=0.6) == {1, 3}
    assert kept_by(logits, min_p=0.45) == {1, 2, 3}
    assert kept_by(logits, min_p=1.0) == {1}


def test_filters_see_scores_after_temperature() -> None:
    logits = [math.log(p) for p in (0.4, 0.3)]
    # At temperature 0.1 the share of the second is 0.053 of the first.
    assert kept_by(logits, min_p=0.5, temperature=0.1) == {0}
    assert kept_by(logits, min_p=0.5, temperature=1.0) == {0, 1}


def test_each_row_has_its_own_parameters() -> None:
    logits = torch.tensor([[0.0, 0.1, 0.2, 0.3]]).repeat(4, 1)
    specs = (
        SamplingSpec(temperature=0.0),
        SamplingSpec(seed=3, top_k=1),
        SamplingSpec(seed=4, top_p=1e-6),
        SamplingSpec(seed=5, min_p=1.0),
    )
    assert sample(logits, rows_of(*specs)).tokens.tolist() == [3, 3, 3, 3]


def test_a_row_draws_the_same_token_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=generator)
    specs = [
        SamplingSpec(seed=11),
        SamplingSpec(temperature=0.0),
        SamplingSpec(seed=12, top_k=20),
        SamplingSpec(seed=13, top_p=0.8),
        SamplingSpec(seed=11, index=1, min_p=0.1),
        SamplingSpec(seed=14, temperature=1.7, top_k=400, top_p=0.99),
    ]
    together = sample(logits.clone(), rows_of(*specs, position=9)).tokens
    for row, spec in enumerate(specs):
        alone = sample(logits[row : row + 1].clone(), rows_of(spec, position=9)).tokens
        assert int(alone[0]) == int(together[row])


def test_repetition_penalty_divides_positive_and_multiplies_negative_over_prompt_and_output() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -0.9]])
    # Token 0 stands in the prompt: 3 / 2 = 1.5 < 2. Padding (token 0) would not count anyway.
    rows = rows_of(SamplingSpec(temperature=0.0, repetition_penalty=2.0))
    rows.history = history_of(prompt=[0, 2], output=[3])
    assert sample(logits, rows).tokens.tolist() == [1]
    assert logits.tolist() == [[1.5, 2.0, -2.0, pytest.approx(-1.8)]]


def test_frequency_and_presence_penalties_count_only_output() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    rows = rows_of(SamplingSpec(temperature=0.0, frequency_penalty=0.25, presence_penalty=0.5))
    rows.history = history_of(prompt=[0, 0, 1], output=[1, 2, 2])
    sample(logits, rows)
    assert logits.tolist() == [[1.0, 1.0 - 0.25 - 0.5, 1.0 - 2 * 0.25 - 0.5, 1.0]]


def test_negative_penalties_reward() -> None:
    logits = torch.tensor([[1.0, 0.9]])
    rows = rows_of(SamplingSpec(temperature=0.0, presence_penalty=-0.5))
    rows.history = history_of(prompt=[0], output=[1])
    assert sample(logits, rows).tokens.tolist() == [1]


def test_only_rows_with_penalties_are_changed() -> None:
    logits = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    rows = rows_of(SamplingSpec(temperature=0.0), SamplingSpec(temperature=0.0, presence_penalty=0.75))
    rows.history = history_of(prompt=[1], output=[0])
    assert sample(logits, rows).tokens.tolist() == [0, 1]
    assert logits[0].tolist() == [1.0, 0.5]


def test_stop_ids_are_masked_until_min_tokens() -> None:
    spec = SamplingSpec(temperature=0.0, min_tokens=3, stop_token_ids=(0, 2))
    logits = torch.tensor([[5.0, 1.0, 4.0, 2.0]])
    assert sample(logits.clone(), rows_of(spec, position=2)).tokens.tolist() == [3]
    assert sample(logits.clone(), rows_of(spec, position=3)).tokens.tolist() == [0]


def test_numbers_beyond_any_vocabulary_are_harmless() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    spec = SamplingSpec(
        temperature=0.0, top_k=1 << 40, min_tokens=1 << 40, logprobs=1 << 40, stop_token_ids=(-1, 1, 99)
    )
    sampled = sample(logits, rows_of(spec))
    assert sampled.tokens.tolist() == [2]
    assert len(sampled.logprobs[0].top_tokens) == 3


def logprobs_of(sampled: Sampled) -> list[tuple[int, float, int]]:
    return [(entry.token, entry.logprob, entry.rank) for entry in sampled.logprobs]


def test_logprobs_are_of_the_raw_model() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    exact = logits[0].log_softmax(-1)
    rows = rows_of(SamplingSpec(temperature=0.3, logprobs=2, repetition_penalty=5.0, min_tokens=1, stop_token_ids=(1,)))
    rows.history = history_of(prompt=[2], output=[])
    sampled = sample(logits, rows)
    token = int(sampled.tokens[0])
    assert token in (0, 2)
    (entry,) = sampled.logprobs
    assert entry.logprob == pytest.approx(float(exact[token]))
    assert entry.rank == {0: 3, 2: 2}[token]
    assert entry.top_tokens.tolist() == [1, 2]
    assert entry.top_tokens.dtype == np.int32
    assert entry.top_logprobs.tolist() == pytest.approx([float(exact[1]), float(exact[2])])
    assert entry.top_logprobs.dtype == np.float32


def test_logprobs_come_only_for_rows_that_asked_and_as_many_as_they_asked() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(4, 1)
    greedy = [SamplingSpec(temperature=0.0, logprobs=n) for n in (-1, 0, 3, 100)]
    sampled = sample(logits, rows_of(*greedy))
    assert sampled.logprob_rows.tolist() == [1, 2, 3]
    assert [len(entry.top_tokens) for entry in sampled.logprobs] == [0, 3, 3]
    assert {entry[0] for entry in logprobs_of(sampled)} == {1}
    assert {entry[2] for entry in logprobs_of(sampled)} == {1}
