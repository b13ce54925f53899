"""Attention replicas of an engine replica: rows and blocks of their own, one lockstep group, one padding rule."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.gather_counts import GatherCounts
from drumline.protocol.errors import InvalidConfig
from tests.unit.core.driver import Driver


def attention_replicas(num_blocks: list[int], lockstep: bool) -> Driver:
    """Two for each engine replica."""
    return Driver(
        num_blocks,
        lockstep=lockstep,
        data_parallel_size=len(num_blocks) // 2,
        attention_data_parallel_size=2,
    )


def waiting(driver: Driver) -> list[int]:
    return [replica.waiting for replica in driver.core.replica_status()]


@pytest.mark.parametrize(("lockstep", "groups"), [(True, [(0, 1)]), (False, [(0,), (1,)])])
def test_a_lockstep_group_is_told_by_its_engine_replicas(lockstep: bool, groups: list[tuple[int, ...]]) -> None:
    driver = attention_replicas([8, 8, 8, 8], lockstep)
    assert [group.replicas for group in driver.core.group_status()] == groups
    places = [(replica.dp_rank, replica.attn_rank) for replica in driver.core.replica_status()]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_attention_replicas_of_a_dense_engine_replica_step_together_and_alone() -> None:
    driver = attention_replicas([8, 8, 8, 8], lockstep=False)
    driver.accept("a", 4, data_parallel_rank=1)
    planned = driver.core.plan(0.0)
    assert [replica for replica, _ in planned] == [2, 3]
    assert [step.num_tokens_across_dp.tolist() for _, step in planned] == [[4, 0], [4, 0]]
    driver.core.apply(2, driver.done(2, planned[0][1], [5]), 0.0)
    driver.core.apply(3, driver.done(3, planned[1][1], []), 0.0)
    assert driver.core.outputs()[0].tokens.tolist() == [5]


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_pinned_request_goes_to_the_least_loaded_attention_replica_of_its_engine_replica(lockstep: bool) -> None:
    driver = attention_replicas([8, 8, 8, 8], lockstep)
    for number in range(3):
        driver.accept(f"r{number}", 4, data_parallel_rank=1)
    assert sorted(waiting(driver)[2:]) == [1, 2]
    assert waiting(driver)[:2] == [0, 0]
    error = driver.refuse("far", 4, data_parallel_rank=2).error
    assert (error.field, error.valid) == ("data_parallel_rank", "-1 to 1")


def test_a_pinned_request_goes_to_the_attention_replica_that_is_large_enough() -> None:
    driver = attention_replicas([8, 8, 2, 4], lockstep=True)
    for number in range(3):
        driver.accept(f"r{number}", 12, data_parallel_rank=1)
    assert waiting(driver) == [0, 0, 0, 3]
    error = driver.refuse("long", 17, data_parallel_rank=1).error
    assert (error.field, error.found, error.valid) == ("prompt", "17 tokens", "at most 16 tokens (4 KV blocks of 4)")


def test_a_burst_is_spread_over_all_attention_replicas() -> None:
    driver = attention_replicas([8, 8, 8, 8], lockstep=False)
    for number in range(8):
        driver.accept(f"r{number}", 4)
    assert waiting(driver) == [2, 2, 2, 2]


def test_there_are_blocks_for_each_attention_replica() -> None:
    with pytest.raises(InvalidConfig, match="num_blocks"):
        Driver([8], data_parallel_size=1, attention_data_parallel_size=2)


@pytest.mark.parametrize(
    "field", ["pipeline_parallel_size", "attention_data_parallel_size", "attention_tensor_parallel_size"]
)
def test_sizes_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Driver(**{field: 0})  # type: ignore[arg-type]
    assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------------ gathering


def gathered(tokens: list[int], attn_dp: int, attn_tp: int) -> GatherCounts:
    counts = GatherCounts()
    counts.note(np.asarray(tokens, dtype=np.int32), attn_dp, attn_tp)
    return counts


@pytest.mark.parametrize(
    ("tokens", "attn_tp", "counts"),
    [
        # Half of the rows or more are real: padded to the largest.
        ([8, 5], 1, GatherCounts(13, 3, 1, 0)),
        ([8, 0], 1, GatherCounts(8, 8, 1, 0)),
        # Shared out over two ranks the shares are 4 4 3 2.
        ([8, 5], 2, GatherCounts(13, 3, 1, 0)),
        ([4, 4], 2, GatherCounts(8, 0, 0, 0)),
        # Two engine replicas, each by itself.
        ([8, 5, 0, 0], 1, GatherCounts(13, 3, 1, 0)),
        ([8, 5, 1, 2], 1, GatherCounts(16, 4, 2, 0)),
    ],
)
def test_what_a_step_gathers_in_vain_is_counted_for_each_engine_replica(
    tokens: list[int], attn_tp: int, counts: GatherCounts
) -> None:
    assert gathered(tokens, 2, attn_tp) == counts


def test_shares_that_would_be_mostly_padding_are_packed() -> None:
    assert gathered([9, 0, 0], 3, 1) == GatherCounts(9, 0, 0, 1)


def test_the_counters_tell_what_gathering_costs_where_there_is_any() -> None:
    driver = attention_replicas([8, 8], lockstep=False)
    driver.accept("a", 8, max_tokens=2)
    driver.accept("b", 5, max_tokens=2)
    driver.run([7], [8])
    driver.run([7], [8])
    names = ("attn_dp_tokens", "attn_dp_padding_rows", "attn_dp_padded_steps", "attn_dp_packed_steps")
    assert [driver.core.counters()[name] for name in names] == [15, 3, 1, 0]
    assert not any(name.startswith("attn_dp") for name in Driver().core.counters())
