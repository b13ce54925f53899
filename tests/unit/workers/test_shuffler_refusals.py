"""Orders and steps that do not fit the experts of a rank: refused, and nothing is changed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import CancelStage, Shuffle, StageExperts
from drumline.workers.experts.expert_layer import canary_of
from tests.unit.workers.staged_worlds import LAYERS, StagedWorld


def int32(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def order(world: StagedWorld, **changes: Any) -> StageExperts:
    """Rank 0's slot 0 gets the expert of rank 1's slot 0, in layer 0."""
    placement = world.placement[0].copy()
    placement[0] = placement[world.starts[1]]
    plain = StageExperts(1, 1, 1, 0, placement, np.array([[0, 0, 1, 0]], dtype=np.int32), int32(0, 1))
    return msgspec.structs.replace(plain, **changes)


def refused_world() -> StagedWorld:
    """Experts 0 and 5 on both ranks, so that either may go."""
    world = StagedWorld(0, (4, 4), 6)
    for number in range(LAYERS):
        world.placement[number] = [0, 1, 2, 5, 3, 4, 5, 0]
    world.layers = [world._layers(rank) for rank in (0, 1)]
    world.shufflers = [type(world.shufflers[0])(layers, 6, rank) for rank, layers in enumerate(world.layers)]
    world.open()
    return world


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 7, "fetches": np.array([[7, 0, 1, 0]], dtype=np.int32)}, "of MoE layer 7; this rank's stage"),
    "other layer": ({"fetches": np.array([[1, 0, 1, 0]], dtype=np.int32)}, "moves of other layers"),
    "checkpoint": ({"fetches": np.array([[0, 0, -1, 0]], dtype=np.int32)}, "or from the checkpoint"),
    "slot": ({"fetches": np.array([[0, 8, 1, 0]], dtype=np.int32)}, "slot 8 from slot 0 of rank 1; valid: slots below"),
    "rank": ({"fetches": np.array([[0, 0, 2, 0]], dtype=np.int32)}, r"of rank 2; valid: slots below 8, ranks \[0, 1\]"),
    "rounds": ({"rounds": int32(0, 2)}, r"rounds \[0, 2\] do not share out 1 moves"),
    "no rounds": ({"rounds": int32()}, r"rounds \[\] do not share out"),
    "parts": ({"parts": 0}, "in 0 parts; valid: 1 to 144"),
    "many parts": ({"parts": 145}, "in 145 parts; valid: 1 to 144, and a generation after 0"),
    "expert": ({"placement": int32(6, 1, 2, 5, 3, 4, 5, 0)}, "found expert 6 in slot 0"),
    "slots": ({"placement": int32(3, 1, 2, 5, 4, 5, 0)}, "numbers from 0 that add up to 7"),
    "nothing brings it": ({"placement": int32(3, 1, 2, 4, 3, 4, 5, 0)}, "its moves do not make it"),
    "twice": (
        {"fetches": np.array([[0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.int32), "rounds": int32(0, 1, 2)},
        "2 experts come to 1 slots",
    ),
    "source": (
        {
            "placement": int32(0, 1, 2, 5, 2, 4, 5, 3),
            "fetches": np.array([[0, 4, 0, 1], [0, 7, 1, 0]], dtype=np.int32),
            "rounds": int32(0, 2),
        },
        "slot 1 does not hold expert 2",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_order_that_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    changes, text = ROWS[name]
    world = refused_world()
    shuffler = world.shufflers[0]
    with pytest.raises(ProtocolError, match=text):
        shuffler.stage(order(world, **changes))
    assert not any(shuffler.moves(layer) for layer in world.layers[0])
    world.check_all()
    assert shuffler.stage(order(world))


def test_orders_come_once_and_in_order() -> None:
    world = refused_world()
    shuffler = world.shufflers[0]
    assert shuffler.stage(order(world, generation=5))
    assert not shuffler.stage(order(world, generation=5))
    with pytest.raises(ProtocolError, match="generation 6 found 5 under way"):
        shuffler.stage(order(world, generation=6))
    with pytest.raises(ProtocolError, match="generation 4 found after 5"):
        shuffler.stage(order(world, generation=4))
    assert shuffler.cancel(CancelStage(1, 1, 5))
    staged = shuffler.poll(1, 1)
    assert staged is not None
    assert (staged.generation, staged.dropped, staged.bytes_received) == (5, True, 0)
    assert not shuffler.cancel(CancelStage(1, 1, 5))
    with pytest.raises(ProtocolError, match="generation 4 is not under way; valid: none"):
        shuffler.cancel(CancelStage(1, 1, 4))


STEPS: tuple[tuple[Shuffle, str], ...] = (
    (Shuffle(2, first=0, end=1), "generation 2 is not under way; valid: 1"),
    (Shuffle(1, first=1, end=2), "parts 1 to 2 of generation 1; valid: from 0, to 1"),
    (Shuffle(1, first=0, end=2), "parts 0 to 2"),
    (Shuffle(1, commit=True), "to be committed and is not whole"),
    (Shuffle(1, home_first=0, home_end=1), "are not to go home now"),
)


@pytest.mark.parametrize(("shuffle", "text"), STEPS)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(shuffle: Shuffle, text: str) -> None:
    world = refused_world()
    world.shufflers[0].stage(order(world))
    with pytest.raises(ProtocolError, match=text):
        world.shufflers[0].begin_step(shuffle, world.points.append)
    world.check_rank(0)
    assert world.points == []


def test_a_commit_comes_once_and_what_is_committed_cannot_be_given_up() -> None:
    world = refused_world()
    rank0, rank1 = world.shufflers
    for shuffler in (rank0, rank1):
        shuffler.stage(order(world))
        shuffler.begin_step(Shuffle(1, first=0, end=1), world.points.append)
    said: set[int] = set()
    for _ in range(100):
        said |= {rank for rank, shuffler in enumerate((rank0, rank1)) if shuffler.poll(1, 1) is not None}
    assert said == {0, 1}
    rank0.begin_step(Shuffle(1, commit=True), world.points.append)
    assert world.layers[0][0].held.tolist() == [3, 1, 2, 5]
    for refused in (Shuffle(1, commit=True), Shuffle(1, home_first=0, home_end=2), Shuffle(1, first=0, end=1)):
        with pytest.raises(ProtocolError):
            rank0.begin_step(refused, world.points.append)
    with pytest.raises(ProtocolError, match="to be cancelled and is committed"):
        rank0.cancel(CancelStage(1, 1, 1))
    rank0.begin_step(Shuffle(1, home_first=0, home_end=1), world.points.append)
    world.check_rank(0)
    with pytest.raises(ProtocolError, match="generation 1 is not under way"):
        rank0.begin_step(Shuffle(1, home_first=1, home_end=1), world.points.append)


def test_an_expert_that_is_not_the_one_that_was_ordered_is_known_by_its_canary() -> None:
    world = refused_world()
    # The sender believes that its slot 0 holds expert 3; what came into it is another.
    world.layers[1][0].canary[0] = canary_of(0, 4)
    for shuffler in world.shufflers:
        shuffler.stage(order(world))
        shuffler.begin_step(Shuffle(1, first=0, end=1), world.points.append)
    with pytest.raises(ProtocolError, match="canary 4 came for slot 0 of MoE layer 0; expected 3"):
        poll_often(world)
    assert world.shufflers[0].spares(world.layers[0][0]) == []


def poll_often(world: StagedWorld) -> None:
    for _ in range(100):
        world.shufflers[0].poll(1, 1)


def test_a_rank_between_epochs_moves_nothing() -> None:
    world = refused_world()
    world.shufflers[0].close()
    with pytest.raises(ProtocolError, match="generation 1 found a rank that moves no experts"):
        world.shufflers[0].stage(order(world))
    assert world.shufflers[0].poll(1, 1) is None
