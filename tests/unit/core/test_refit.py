"""Where the experts go when ranks are lost and come back."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.decisions import EpochReady
from drumline.engine.core.members import GroupStage
from drumline.protocol.layout import Layout
from drumline.protocol.messages import Configure, Load
from tests.unit.core.fake_ranks import FakeRanks, config

FOUR = Layout(4, 1, 1, enable_expert_parallel=True)


def losing(rank: int, layout: Layout | None = None, **more: object) -> FakeRanks:
    """All ranks computed, one has died, and its replacement has not loaded."""
    ranks = FakeRanks(config(layout, **more)).start()  # type: ignore[arg-type]
    ranks.slow = {rank}
    ranks.forget()
    ranks.kill(rank)
    return ranks


def test_survivors_grow_and_read_what_was_lost_from_the_checkpoint() -> None:
    ranks = losing(3, FOUR)
    configure = ranks.said(Configure)[0]
    assert configure.slots.tolist() == [3, 3, 2]
    for layer in configure.placement:
        assert sorted(layer.tolist()) == list(range(8))
        # What survivors had stays in its place.
        assert [layer[0], layer[1], layer[3], layer[4], layer[6], layer[7]] == [0, 1, 2, 3, 4, 5]
    assert configure.fetches.tolist() == [[0, 2, -1, 0], [0, 5, -1, 0], [1, 2, -1, 0], [1, 5, -1, 0]]


def test_who_comes_back_has_its_first_experts_and_nothing_is_moved() -> None:
    ranks = losing(3, FOUR)
    ranks.forget()
    ranks.load(3)
    ranks.pump(ranks.membership.drained(0, ranks.now))
    configure = ranks.said(Configure)[0]
    assert configure.slots.tolist() == [2, 2, 2, 2]
    assert configure.placement.tolist() == [list(range(8))] * 2
    assert configure.fetches.shape == (0, 4)


def test_a_replacement_loads_the_share_and_the_blocks_of_the_one_before() -> None:
    ranks = losing(3, FOUR)
    (load,) = ranks.said(Load)
    assert load.experts.tolist() == [[6, 7]] * 2
    assert load.num_blocks == 12


def test_parked_ranks_give_copies_of_what_they_hold() -> None:
    ranks = losing(3, Layout(2, 1, 2, enable_expert_parallel=True))
    configure = ranks.said(Configure)[0]
    assert configure.slots.tolist() == [4, 4]
    # Rank 2 lives and holds 4 and 5, 6 and 7 died with rank 3.
    sources = {int(configure.placement[layer, slot]): source for layer, slot, source, _ in configure.fetches}
    assert sources == {4: 2, 5: 2, 6: -1, 7: -1}


def test_each_stage_holds_the_experts_of_its_own_layers() -> None:
    ranks = losing(2, Layout(2, 2, 1, enable_expert_parallel=True))
    # Rank 2 held layer 0 of the second replica; rank 3, which is parked, holds its layer 1.
    configure = ranks.said(Configure)[0]
    sources = {(int(layer), int(source)) for layer, _, source, _ in configure.fetches}
    assert sources == {(0, -1), (1, 3)}


@pytest.mark.parametrize("growth", [0, 399])
def test_without_room_the_group_waits_for_the_replacement_and_says_so(growth: int) -> None:
    ranks = losing(1, expert_growth_bytes=growth)
    assert not ranks.said(EpochReady)
    assert ranks.membership.groups[0].stage is GroupStage.GATHERING
    assert "group 0 waits for rank 1 (starting): 8 experts do not fit" in ranks.membership.waiting_for
    ranks.load(1)
    assert ranks.said(EpochReady)[0].serving == (0, 1)
    assert ranks.said(EpochReady)[0].kept == (0,)


def test_with_room_enough_it_goes_on() -> None:
    ranks = losing(1, expert_growth_bytes=400)
    assert ranks.said(EpochReady)[0].serving == (0,)


def test_sharded_experts_are_cut_anew_within_the_same_limit() -> None:
    tensor_sharded = Layout(2)
    ranks = losing(1, tensor_sharded, expert_growth_bytes=400)
    configure = ranks.said(Configure)[0]
    assert configure.placement.tolist() == [list(range(8))] * 2
    assert (configure.slots.size, configure.fetches.shape) == (0, (0, 4))
    assert ranks.said(Load)[0].experts.shape == (0, 0)
    ranks = losing(1, tensor_sharded, expert_growth_bytes=399)
    assert "rank 0 would need 400 bytes more for its shards of experts, and may take 399" in (
        ranks.membership.waiting_for
    )


def test_grown_ranks_keep_what_they_hold_when_another_one_dies() -> None:
    ranks = losing(3, FOUR)
    ranks.slow = {2, 3}
    ranks.forget()
    ranks.kill(2)
    configure = ranks.said(Configure)[0]
    assert configure.slots.tolist() == [4, 4]
    assert np.isin(configure.fetches[:, 2], [-1]).all()
    assert len(configure.fetches) == 2 * 2


def test_staged_copies_and_what_was_replaced_are_taken_before_the_checkpoint() -> None:
    """Experts 6 and 7 died with their rank: one copy was on its way, the other had just been replaced."""
    ranks = FakeRanks(config(FOUR)).start()
    ranks.slow = {3}
    ranks.spare = {1: np.array([[-1, 6], [7, -1]], dtype=np.int32)}
    ranks.forget()
    ranks.kill(3)
    configure = ranks.said(Configure)[0]
    assert configure.slots.tolist() == [3, 3, 2]  # what is spare is no room of its own
    by_expert = {
        (layer, int(configure.placement[layer, slot])): (rank, at) for layer, slot, rank, at in configure.fetches
    }
    assert by_expert == {(0, 6): (1, 3), (0, 7): (-1, 0), (1, 6): (-1, 0), (1, 7): (1, 2)}
