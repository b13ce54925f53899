"""Sampling noise: a pure function of the row, with the distribution it claims."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from drumline.workers.noise import gumbel_noise, row_keys, uniform_noise

CPU = torch.device("cpu")


def uniform(seed: int, index: int, position: int, vocab_size: int) -> Tensor:
    return uniform_noise(np.array([seed], np.uint64), np.array([index]), np.array([position]), vocab_size, CPU)[0]


def splitmix(value: int) -> int:
    """The finaliser, in Python integers."""
    mask = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_bits_are_those_of_splitmix_in_plain_integers() -> None:
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    seed, index, position = (1 << 64) - 5, 3, 1234
    key = splitmix((seed + golden) & mask)
    key = splitmix(((key ^ index) + golden) & mask)
    key = splitmix(((key ^ position) + golden) & mask)
    assert int(row_keys(np.array([seed], np.uint64), np.array([index]), np.array([position]))[0]) == key
    found = uniform(seed, index, position, 50)
    for token in range(50):
        bits = splitmix((key + (token + 1) * golden) & mask) >> 11
        assert math.isclose(float(found[token]), (bits + 0.5) / 2**53, rel_tol=1e-6)


def test_a_row_has_the_same_noise_in_any_company() -> None:
    seeds = np.array([7, 1 << 63, 7, 9], np.uint64)
    indices, positions = np.array([0, 1, 2, 0]), np.array([5, 0, 5, 6])
    together = gumbel_noise(seeds, indices, positions, 1000, CPU)
    for row in range(4):
        alone = gumbel_noise(seeds[[row]], indices[[row]], positions[[row]], 1000, CPU)
        assert torch.equal(alone[0], together[row])


def test_a_larger_vocabulary_keeps_the_noise_of_the_first_tokens() -> None:
    assert torch.equal(uniform(1, 0, 0, 1000)[:300], uniform(1, 0, 0, 300))


def test_seed_index_position_and_token_each_matter() -> None:
    base = uniform(1, 0, 0, 100)
    for other in (uniform(2, 0, 0, 100), uniform(1, 1, 0, 100), uniform(1, 0, 1, 100)):
        assert not (base == other).any()
    assert len(set(base.tolist())) == 100
    # Neighbouring parameters must not give shifted copies of one sequence.
    assert not (base[1:] == uniform(2, 0, 0, 100)[:-1]).any()


def test_uniforms_are_uniform_and_within_the_open_interval() -> None:
    seeds = np.arange(200, dtype=np.uint64)
    zeros = np.zeros(200, np.int64)
    values = uniform_noise(seeds, zeros, zeros, 5000, CPU).flatten()
    assert 0.0 < float(values.min()) < float(values.max()) < 1.0
    counts = torch.histc(values, bins=20, min=0.0, max=1.0)
    expected = len(values) / 20
    # 19 degrees of freedom: beyond 44 once in a thousand draws, and this draw is always the same one.
    assert float(((counts - expected) ** 2 / expected).sum()) < 44


def test_gumbel_noise_is_finite_and_has_the_mean_and_variance_of_the_distribution() -> None:
    seeds = np.arange(200, dtype=np.uint64)
    zeros = np.zeros(200, np.int64)
    values = gumbel_noise(seeds, zeros, zeros, 5000, CPU)
    assert bool(values.isfinite().all())
    assert abs(float(values.mean()) - 0.57722) < 0.005
    assert abs(float(values.var()) - math.pi**2 / 6) < 0.01
