"""Single misfortunes, and what must come of each: the promises of the failure model on the virtual clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from drumline.engine.core.config import CoreConfig
from drumline.protocol.layout import Layout
from drumline.protocol.messages import SamplingSpec, Submit
from tests.simulation.cluster.day import Day
from tests.simulation.cluster.faults import RankFault
from tests.simulation.cluster.schedule import OtherFault, Schedule
from tests.simulation.cluster.shape import Shape
from tests.simulation.cluster.streams import Wanted

LAYOUTS = (
    Layout(2, enable_expert_parallel=True),
    Layout(4, enable_expert_parallel=True),
    Layout(2, 1, 2, enable_expert_parallel=True),
    Layout(2, 2, 1, enable_expert_parallel=True),
    Layout(2, 1, 2),
)


def plain_shape(layout: Layout, **changed: Any) -> Shape:
    """A MoE engine in which nothing is short."""
    core = CoreConfig(
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        block_size=4,
        max_model_len=200,
        vocab_size=1000,
        data_parallel_size=layout.data_parallel_size,
        lockstep=True,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        attention_tensor_parallel_size=layout.attn_tp_size,
    )
    stages = tuple(range(layout.pipeline_parallel_size))
    shape = Shape(
        layout=layout, core=core, num_blocks=400, num_experts=2 * layout.ep_size, moe_layer_stage=stages, load_s=5.0
    )
    for name, value in changed.items():
        setattr(shape, name, value)
    return shape


def streams(count: int = 6, tokens: int = 180) -> list[Wanted]:
    """Requests that run for some seconds, of two clients."""
    return [
        Wanted(
            Submit(
                0,
                f"r{number}",
                np.arange(number, number + 9, dtype=np.int32),
                SamplingSpec(seed=number),
                max_tokens=tokens,
                seed_given=True,
                ignore_eos=True,
                nonce=f"n{number}",
                durable=True,
            ),
            client=number % 2,
            at=0.5,
        )
        for number in range(count)
    ]


def run(shape: Shape, *faults: RankFault | OtherFault, wanted: list[Wanted] | None = None) -> tuple[Day, Counter[str]]:
    """One day with those faults alone. Every stream is held against the oracle while it runs."""
    ranks = [fault for fault in faults if isinstance(fault, RankFault)]
    others = [fault for fault in faults if isinstance(fault, OtherFault)]
    day = Day(Schedule(7, shape, wanted or streams(), ranks, others))
    return day, day.run()


def longest_pause(day: Day) -> float:
    """Seconds that some stream stood still."""
    return max(asked.longest_pause for client in day.cluster.clients for asked in client.asked.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=("dp2", "dp4", "dp2-tp2", "dp2-pp2", "dp2-tp2-no-ep"))
def test_survivors_go_on_long_before_the_replacement_has_loaded(layout: Layout) -> None:
    day, seen = run(plain_shape(layout), RankFault("kill", layout.num_ranks - 1, 8.0, "decode"))
    assert seen["fault_kill"] == 1
    assert seen["event_joined"] >= 1
    assert longest_pause(day) < 1.0


def test_a_stopped_rank_does_not_hold_up_the_streams_for_as_long_as_it_is_stopped() -> None:
    day, seen = run(plain_shape(LAYOUTS[0]), RankFault("stop", 1, 8.0, "decode", 40.0))
    assert seen["fault_stop"] == 1
    assert seen["told_wedged"] == 1
    assert longest_pause(day) < 4.0


def test_a_killed_coordinator_costs_no_weights_and_no_token() -> None:
    day, seen = run(plain_shape(LAYOUTS[2]), OtherFault("coordinator", 8.0), OtherFault("coordinator", 10.0))
    assert seen["terms"] == 3
    assert seen["spawned"] == 4
    assert seen["end_length"] == 6
    assert day.cluster.term == 3


def test_the_poisoned_request_fails_and_no_other() -> None:
    wanted = streams()
    wanted[3].poison = True
    wanted[3].at = 8.0
    _, seen = run(plain_shape(LAYOUTS[0], load_s=0.5), wanted=wanted)
    assert seen["failed_poisoned"] == 1
    assert seen["end_length"] == 5
    assert 2 <= seen["poison_deaths"] <= 6


def test_a_request_without_finite_numbers_fails_at_the_second_time_and_kills_nobody() -> None:
    wanted = streams()
    wanted[3].not_finite = True
    _, seen = run(plain_shape(LAYOUTS[0]), wanted=wanted)
    assert seen["failed_numeric"] == 1
    assert seen["end_length"] == 5
    assert seen["spawned"] == 2


def test_a_full_disk_stops_nobody_and_the_next_coordinator_takes_over_what_clients_bring() -> None:
    faults = (OtherFault("full_disk", 7.0, seconds=60.0), OtherFault("coordinator", 8.5))
    _, seen = run(plain_shape(LAYOUTS[0]), *faults)
    assert seen["journal_degraded"] >= 1
    assert seen["end_length"] == 6
