"""Which load is planned for, out of several snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drumline.engine.core.balance.forecast import CHANCE, forecast, uneven

F64 = np.ndarray[Any, np.dtype[np.float64]]


def _base(seed: int = 0) -> F64:
    return np.random.default_rng(seed).lognormal(0.0, 1.0, (4, 64))


def _noisy(times: int, sigma: float) -> F64:
    random = np.random.default_rng(1)
    return _base() * (1.0 + sigma * random.standard_normal((times, 4, 64)))


def test_one_snapshot_is_itself_and_may_be_off() -> None:
    seen = forecast(_base()[None])
    assert (seen.load == _base()).all()
    assert seen.off == CHANCE


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_noise_is_averaged_out(sigma: float) -> None:
    loads = _noisy(8, sigma)
    seen = forecast(loads)
    assert seen.load == pytest.approx(loads.mean(axis=0), rel=0.02)
    assert seen.off == pytest.approx(sigma / np.sqrt(8), rel=0.3)


def test_experts_whose_load_swings_count_for_more() -> None:
    loads = np.repeat(_base()[None], 4, axis=0)
    loads[::2, :, :2] += [0.02, -0.02]
    seen = forecast(loads)
    assert (seen.demand[:, :2] > seen.load[:, :2]).all()
    assert seen.demand[:, 2:] == pytest.approx(seen.load[:, 2:])


def test_of_a_load_that_drifts_the_newest_counts() -> None:
    loads = [_base()]
    for seed in range(1, 6):
        loads.append(0.7 * loads[-1] + 0.3 * _base(seed))
        total = np.stack(loads).sum(axis=2)
        assert forecast(np.stack(loads)).load == pytest.approx(
            loads[-1] / total[-1][:, None] * total.mean(axis=0)[:, None]
        )


def test_of_a_load_that_has_jumped_the_newest_counts() -> None:
    loads = np.concatenate([_noisy(7, 0.05), _base(9)[None]])
    seen = forecast(loads)
    shares = [load / load.sum(axis=1, keepdims=True) for load in (seen.load, _base(9))]
    assert shares[0] == pytest.approx(shares[1])


def test_of_a_load_that_goes_further_than_it_shakes_the_newest_counts() -> None:
    random, walk = np.random.default_rng(2), [_base()]
    for _ in range(7):
        walk.append(walk[-1] * (1.0 + 0.1 * random.standard_normal((4, 64))))
    loads = np.stack(walk) * (1.0 + 0.05 * random.standard_normal((8, 4, 64)))
    shares = [load / load.sum(axis=1, keepdims=True) for load in (forecast(loads).load, loads[-1])]
    assert shares[0] == pytest.approx(shares[1])


def test_of_a_load_that_shakes_more_than_it_goes_newer_ones_count_more() -> None:
    random, walk = np.random.default_rng(2), [_base()]
    for _ in range(7):
        walk.append(walk[-1] * (1.0 + 0.05 * random.standard_normal((4, 64))))
    loads = np.stack(walk) * (1.0 + 0.15 * random.standard_normal((8, 4, 64)))
    seen, truth = forecast(loads).load, walk[-1]
    off = [float(np.abs(load - truth).sum()) for load in (seen, loads[-1], loads.mean(axis=0))]
    assert off[0] == min(off)


def test_what_was_only_busier_is_no_other_load() -> None:
    seen = forecast(np.stack([_base(), 5.0 * _base()]))
    assert seen.load == pytest.approx(3.0 * _base())
    assert seen.off == pytest.approx(0.0, abs=1e-6)


def test_snapshots_without_tokens_say_nothing() -> None:
    seen = forecast(np.stack([_base(), np.zeros((4, 64))]))
    assert (seen.load == _base()).all()
    assert not forecast(np.zeros((3, 4, 64))).load.any()


def test_a_layer_is_uneven_only_beyond_what_chance_explains() -> None:
    ranks, placement = np.repeat(np.arange(4, dtype=np.int32), 4), np.arange(16, dtype=np.int32).reshape(1, 16)
    load = np.ones((1, 16))
    load[0, :4] = 1.05
    assert not uneven(load, CHANCE, placement, ranks)[0][0]
    load[0, :4] = 1.2
    assert uneven(load, CHANCE, placement, ranks)[0][0]
    load[0, :4] = 1.01
    assert uneven(load, 0.0, placement, ranks)[0][0]
