"""3,000 random interleavings of submit, finish, cancel, stop, resume and worse; each ends with every invariant
whole."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from drumline.engine.core.batch_table import DECODE, BatchTable
from drumline.engine.core.block_pool import I64, BlockPool
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.lanes import LaneTurns
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.prefix_cache import PrefixCache
from drumline.engine.core.residence import Residence
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import SamplingSpec, StepDone, Submit
from tests.simulation.scenario import Plan, Scenario, make_scenario, make_wide_scenario
from tests.simulation.simulation import run_scenario
from tests.simulation.worker import RuleBrokenError

BATCH = 500
BATCHES = 6


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_interleavings_end_with_every_request_ended(batch: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        seen.update(run_scenario(make_scenario(seed)))
    assert_met(
        seen,
        ["cancel", "stop_string", "resume", "drop", "new_epoch", "end_stop", "end_length", "end_abort"],
        ["core_preemptions", "core_prefix_hit_tokens", "core_chunked_prefills", "dummy_steps"],
        ["refused_duplicate", "refused_stale", "refused_early", "refused_short", "rejected_queue_full"],
        ["lost", "kept", "closed_again", "fewer_serve", "join"],
        ["lane_0", "lane_1", "lane_2", "core_attn_dp_padded_steps", "core_attn_dp_packed_steps"],
    )


def assert_met(seen: Counter[str], *wanted: list[str]) -> None:
    """A run that meets none of what it is for proves nothing."""
    assert [name for names in wanted for name in names if seen[name] == 0] == []


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_each_layout_runs_with_and_without_a_step_in_flight_beyond_one_per_stage(
    dp: int, pp: int, async_scheduling: bool
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1_000_000, 1_000_040):
        seen.update(run_scenario(make_scenario(seed, dp=dp, async_scheduling=async_scheduling, pp=pp)))
    assert_met(seen, ["end_stop", "end_length", "core_preemptions"])


def test_wide_batches_that_are_short_of_blocks_end_whole_too() -> None:
    seen: Counter[str] = Counter()
    for seed in range(10):
        seen.update(run_scenario(make_wide_scenario(seed)))
    assert_met(seen, ["end_stop", "end_length", "end_abort", "core_preemptions", "core_prefix_hit_tokens", "new_epoch"])


def _ignore_stops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchTable, "stopping", lambda table, rows, tokens: np.zeros(len(rows), dtype=np.bool_))


def _reuse_rows_in_flight(patch: pytest.MonkeyPatch) -> None:
    release = Residence.release
    patch.setattr(Residence, "release", lambda self, acknowledged: release(self, [1 << 40] * len(acknowledged)))


def _trust_a_cache_of_lost_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "forget", lambda cache, replica: None)


def _leak_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "release", lambda pool, replica, blocks: None)


def _take_any_answer(patch: pytest.MonkeyPatch) -> None:
    apply = LockstepGroup.apply

    def lenient(group: LockstepGroup, replica: int, done: StepDone) -> None:
        with contextlib.suppress(ProtocolError):
            apply(group, replica, done)

    patch.setattr(LockstepGroup, "apply", lenient)


def _decode_rows_of_every_lane(patch: pytest.MonkeyPatch) -> None:
    def all_that_decode(table: BatchTable, lane: int) -> tuple[I64, I64]:
        rows = np.flatnonzero(table.status == DECODE)
        return rows, table.bounds(rows)

    patch.setattr(BatchTable, "decoding", all_that_decode)


def _give_every_step_to_one_lane(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LaneTurns, "took", lambda turns, lane: None)


BREAKAGES = [
    _ignore_stops,
    _reuse_rows_in_flight,
    _trust_a_cache_of_lost_blocks,
    _leak_blocks,
    _take_any_answer,
    _decode_rows_of_every_lane,
    _give_every_step_to_one_lane,
]


@pytest.mark.parametrize("break_core", BREAKAGES)
def test_a_broken_core_is_caught_and_the_seed_that_replays_it_named(
    break_core: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_core(monkeypatch)
    with pytest.raises(RuleBrokenError, match=r"seed (\d+) at [^\0]*soak --seed \1"):
        _run_seeds(300)


def _run_seeds(count: int) -> None:
    for seed in range(count):
        run_scenario(make_scenario(seed))


def test_a_wave_ends_without_more_dummy_steps_than_were_in_flight() -> None:
    """One request on two replicas: the other one runs dummy steps, and none after the request's last token is known."""
    config = CoreConfig(
        max_num_seqs=2,
        max_num_batched_tokens=8,
        block_size=4,
        max_model_len=32,
        vocab_size=1000,
        data_parallel_size=2,
        lockstep=True,
    )
    scenario = Scenario(0, config, [8, 8], [Plan(_long_request("r0"), 0, 0.0)], 1.0, 0.0, 0.0, False)
    seen = run_scenario(scenario)
    # 6 prompt tokens in one step, then 9 more tokens, each in a step: the length ends it, so no step is in vain.
    assert (seen["steps"], seen["dummy_steps"]) == (10, 10)


def _long_request(request_id: str) -> Submit:
    return Submit(
        1,
        request_id,
        np.arange(6, dtype=np.int32),
        SamplingSpec(seed=5),
        max_tokens=10,
        seed_given=True,
        ignore_eos=True,
    )
