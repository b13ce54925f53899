"""Which ranks meet in the groups of an epoch, by their numbers in the whole world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from drumline.protocol.errors import ProtocolError
from drumline.protocol.layout import Layout
from drumline.workers.epoch_groups import EpochGroups
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.groups import PeerLost


@dataclass
class FormedGroup:
    """As much of a group as is looked at while an epoch forms."""

    name: str
    ranks: tuple[int, ...]
    connect: bool
    mailboxes: None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    closed: bool = False

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


def formed(place: EpochPlace, me: int, *, lockstep: bool = True) -> tuple[EpochGroups, dict[str, FormedGroup]]:
    groups: dict[str, FormedGroup] = {}

    def form(name: str, ranks: tuple[int, ...], connect: bool) -> Any:
        groups[name.split(".")[0]] = FormedGroup(name, ranks, connect)
        return groups[name.split(".")[0]]

    epoch = EpochGroups(place, me, lockstep=lockstep, all2all_backend="allgather_reducescatter", form=form)
    return epoch, groups


WORLD = Layout(data_parallel_size=3, tensor_parallel_size=2, pipeline_parallel_size=2, enable_expert_parallel=True)


def test_groups_are_those_of_the_members_under_their_own_numbers() -> None:
    # Of three engine replicas of four ranks the first is gone: ranks 4 to 11 compute.
    place = EpochPlace.of(WORLD, range(4, 12), 7)
    assert (place.rank, place.ranks, place.layout.data_parallel_size) == (3, tuple(range(4, 12)), 2)
    _, groups = formed(place, 7)
    assert {name: group.ranks for name, group in groups.items()} == {
        "tp": (6, 7),
        "attn_dp": (7,),
        "pp": (5, 7),
        "pp_tokens": (5, 7),
        "dp": (7, 11),
        "ep": (6, 7, 10, 11),
    }
    assert groups["tp"].name == "tp.6"
    assert [name for name, group in groups.items() if group.connect] == ["pp", "pp_tokens"]


def test_members_need_not_be_neighbours() -> None:
    place = EpochPlace.of(WORLD, [8, 9, 10, 11, 0, 1, 2, 3], 10)
    _, groups = formed(place, 10)
    assert groups["dp"].ranks == (2, 10)
    assert groups["ep"].ranks == (2, 3, 10, 11)


def test_a_parked_rank_is_alone_in_all_of_its_groups() -> None:
    place = EpochPlace.of(WORLD, range(4), 5)
    assert (place.rank, place.parked) == (-1, True)
    epoch, groups = formed(place, 5)
    assert {group.ranks for group in groups.values()} == {(5,)}
    assert epoch.for_steps().pipeline is None


def test_engine_replicas_of_a_dense_model_share_no_group() -> None:
    world = Layout(data_parallel_size=2, tensor_parallel_size=2)
    _, groups = formed(EpochPlace.of(world, (2, 3), 3), 3, lockstep=False)
    assert groups["tp"].ranks == (2, 3)
    assert groups["dp"].ranks == groups["ep"].ranks == (3,)


@pytest.mark.parametrize("members", [(), (0, 1, 2), (1, 2, 3, 4), (0, 1, 2, 3, 11)])
def test_members_that_are_no_whole_replicas_are_refused(members: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="not whole engine replicas of 4 ranks"):
        EpochPlace.of(WORLD, members, 0)


def test_what_was_formed_is_closed_when_a_later_group_cannot_be() -> None:
    groups: list[FormedGroup] = []

    def form(name: str, ranks: tuple[int, ...], connect: bool) -> Any:
        if name.startswith("dp"):
            raise PeerLost("rank 3 is gone")
        groups.append(FormedGroup(name, ranks, connect))
        return groups[-1]

    with pytest.raises(PeerLost):
        EpochGroups(EpochPlace.of(WORLD, range(4), 0), 0, lockstep=True, all2all_backend="all_to_all", form=form)
    assert len(groups) == 4
    assert all(group.closed for group in groups)
