"""All experts of real processes from one placement to another, over shared memory and over gloo."""

from __future__ import annotations

import pytest

from drumline.workers.experts import EplbState
from tests.integration.workers.conftest import RunRanks

WAYS = ["sockets", "memory"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_slot_holds_its_expert_and_the_fewest_bytes_have_travelled(
    run_ranks: RunRanks, world: int, way: str
) -> None:
    found = run_ranks("random_placements_in_turn", world, way)
    assert sum(sent for sent, _ in found) == found[0][1] > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_goes_and_comes_back(run_ranks: RunRanks, way: str) -> None:
    assert run_ranks("four_ranks_become_three_and_four_again", 4, way) == ["held"] * 4


def test_a_process_group_of_torch_will_do(run_ranks: RunRanks) -> None:
    assert run_ranks("over_a_process_group_of_torch", 3) == ["held"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_balancer_comes_to_the_same_placements_on_every_rank(run_ranks: RunRanks, way: str) -> None:
    first, *others = run_ranks("rearranged_again_and_again", 4, way)
    assert others == [first] * 3
    # After a quarter of the interval, and then after each whole one.
    changes = [step for step in range(1, 9) if first[step] != first[step - 1]]
    assert first[0] != [EplbState.build_initial_global_physical_to_logical_map(6, 2)] * 2
    assert changes == [4, 8]
