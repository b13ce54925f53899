"""Ranks of one thread whose experts move between steps, as the coordinator's own run of a plan orders it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun, layer_plans
from drumline.protocol.layout import Layout
from drumline.protocol.messages import CancelStage, I32Matrix, StageExperts
from drumline.protocol.placement import PlacementMaps
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.expert_layer import ExpertLayer, ExpertWeights, canary_of
from drumline.workers.experts.shuffler import Shuffler
from drumline.workers.layers import LocalExperts, ModelGroups, MoeLayer, RoutingView
from tests.unit.workers.shuffles import same_bits

LAYERS, HIDDEN, WIDTH = 2, 4, 3
CPU = torch.device("cpu")


@functools.cache
def expert(layer: int, number: int, dtype: torch.dtype) -> ExpertWeights:
    """The weights of one expert: bytes that nothing else has."""
    generator = torch.Generator().manual_seed(1000 * layer + number)
    shapes = ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    parts = [
        torch.randint(0, 256, (int(np.prod(shape)) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
        for shape in shapes
    ]
    return parts[0], parts[1]


def is_expert(weights: ExpertWeights, layer: int, number: int) -> bool:
    """Whether these are the weights of that expert, bit for bit."""
    expected = expert(layer, number, weights[0].dtype)
    return all(same_bits(found, wanted) for found, wanted in zip(weights, expected, strict=True))


def distinct_placement(draw: np.random.Generator, slots: Sequence[int], experts: int) -> I32Matrix:
    """int32 (layers, slots): every expert somewhere, no rank with two copies of one."""
    layers = []
    for _ in range(LAYERS):
        ranks: list[list[int]] = [[] for _ in slots]
        for one in draw.permutation(experts).tolist():
            ranks[draw.choice([rank for rank, share in enumerate(slots) if len(ranks[rank]) < share])].append(one)
        for rank, share in enumerate(slots):
            others = [one for one in range(experts) if one not in ranks[rank]]
            ranks[rank] += draw.permutation(others)[: share - len(ranks[rank])].tolist()
        layers.append([one for rank in ranks for one in draw.permutation(rank).tolist()])
    return np.array(layers, dtype=np.int32)


@dataclass
class PostOffice:
    """The messages of some ranks: each pair's come in order, and sooner or later. A pair has ``room`` for so many that
    are not read yet."""

    draw: np.random.Generator
    room: int = 3
    boxes: dict[tuple[int, int], deque[Tensor]] = field(default_factory=dict)
    expected: dict[tuple[int, int], deque[_Receive]] = field(default_factory=dict)

    def member(self, rank: int) -> Any:
        return _Member(self, rank)


@dataclass
class _Member:
    office: PostOffice
    rank: int

    def has_room(self, dst: int) -> bool:
        return len(self.office.boxes.get((self.rank, dst), ())) < self.office.room

    def isend(self, t: Tensor, dst: int) -> _Send:
        assert self.has_room(dst), "a send would wait"
        self.office.boxes.setdefault((self.rank, dst), deque()).append(t.clone())
        return _Send(self.office)

    def irecv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> _Receive:
        receive = _Receive(self.office, (src, self.rank), torch.empty(tuple(shape), dtype=dtype))
        self.office.expected.setdefault((src, self.rank), deque()).append(receive)
        return receive


@dataclass
class _Send:
    office: PostOffice

    def look(self, slice_s: float) -> bool:
        assert slice_s == 0.0
        return bool(self.office.draw.random() < 0.5)


@dataclass
class _Receive:
    office: PostOffice
    pair: tuple[int, int]
    result: Tensor
    read: bool = False

    def look(self, slice_s: float) -> bool:
        assert slice_s == 0.0
        expected = self.office.expected[self.pair]
        while not self.read and self.office.boxes.get(self.pair) and self.office.draw.random() < 0.7:
            first, message = expected.popleft(), self.office.boxes[self.pair].popleft()
            assert first.result.shape == message.shape
            first.result.copy_(message)
            first.read = True
        return self.read


class StagedWorld:
    """``shufflers`` and ``layers`` by rank. ``placement``: int32 (layers, slots), what all ranks have in common."""

    def __init__(
        self,
        seed: int,
        slots: Sequence[int],
        experts: int,
        dtype: torch.dtype = torch.float32,
        nodes: Sequence[int] = (),
    ) -> None:
        self.draw = np.random.default_rng(seed)
        self.slots, self.experts, self.dtype = tuple(slots), experts, dtype
        self.starts = np.cumsum([0, *slots]).tolist()
        self.placement = distinct_placement(self.draw, slots, experts)
        layout = Layout(data_parallel_size=len(slots), enable_expert_parallel=True)
        everyone = tuple(range(len(slots)))
        self.epochs = [EpochPlace.of(layout, everyone, rank) for rank in everyone]
        self.nodes = tuple(nodes)
        hosts = np.array(nodes or [0] * len(slots), dtype=np.int32)
        self.places = ExpertPlaces((everyone,), np.array(slots, dtype=np.int32), hosts, (0,) * LAYERS)
        self.layers = [self._layers(rank) for rank in everyone]
        self.shufflers = [Shuffler(layers, experts, rank) for rank, layers in enumerate(self.layers)]
        self.generation, self.step, self.points = 1, 0, list[str]()
        self.open()

    def _layers(self, rank: int) -> list[ExpertLayer]:
        maps = PlacementMaps.build(self.placement, self.experts, len(self.slots), self.slots)
        layers = []
        for number in range(LAYERS):
            held = self.own(self.placement[number], rank)
            weights = [expert(number, one, self.dtype) for one in held]
            stacked = [torch.stack([one[part] for one in weights]) for part in (0, 1)]
            routing = RoutingView.of(maps, number, rank, CPU, self.nodes)
            moe = MoeLayer(
                lambda x: (x, x), LocalExperts(stacked[0], stacked[1]), routing, ModelGroups(), None, sharded=False
            )
            layers.append(ExpertLayer(moe, number, number, held, (0, WIDTH)))
        return layers

    def own(self, row: Any, rank: int) -> list[int]:
        """The part of all slots of a layer that is of ``rank``."""
        found: list[int] = row[self.starts[rank] : self.starts[rank + 1]].tolist()
        return found

    def open(self) -> None:
        """An epoch begins, with nothing of the one before under way."""
        self.office = PostOffice(self.draw)
        for rank, shuffler in enumerate(self.shufflers):
            shuffler.open(self.epochs[rank], self.slots, self.nodes, self.office.member(rank))

    # --------------------------------------------------------------------------------------------------------- plans

    def moves_to(self, target: I32Matrix) -> I32Matrix:
        """int32 (n, 4) as in PlacementPlan: what each rank lacks, from anyone who has it, what it has from itself."""
        rows = []
        for layer in range(LAYERS):
            before = self.placement[layer]
            for slot in np.flatnonzero(before != target[layer]).tolist():
                rank = int(self.places.slot_rank[slot])
                copies = np.flatnonzero(before == target[layer, slot])
                own = [copy for copy in copies.tolist() if self.places.slot_rank[copy] == rank]
                copy = own[0] if own else int(self.draw.choice(copies))
                rows.append((layer, slot, int(self.places.slot_rank[copy]), copy))
        return np.array(rows, dtype=np.int32).reshape(-1, 4)

    def run_to(self, target: I32Matrix, parts: int = 1, parts_per_step: int = 1) -> ShuffleRun:
        """The coordinator's run of a plan, its first messages delivered."""
        nbytes = sum(part.nbytes for part in expert(0, 0, self.dtype))
        pace = Pace(nbytes, -(-nbytes // parts) * parts_per_step, 30.0)
        run = ShuffleRun(
            layer_plans(target, self.moves_to(target), self.places), self.places, pace, 1, 1, self.generation
        )
        self.target = target
        self.deliver(run)
        return run

    def deliver(self, run: ShuffleRun) -> None:
        """What the run has to say to ranks."""
        for one in run.take():
            message, shuffler = one.message, self.shufflers[one.rank]
            if isinstance(message, StageExperts):
                assert shuffler.stage(message)
            elif isinstance(message, CancelStage):
                assert shuffler.cancel(message)
        self.generation = run.generation

    def run_step(self, run: ShuffleRun) -> None:
        """One step on each rank, in any order; what they say then is heard."""
        # What the run has to say then comes behind the step: the next layer is ordered while this one goes home.
        shuffle, committed = run.next(self.step, 0.0)
        for rank in self.draw.permutation(len(self.shufflers)).tolist():
            if shuffle is not None:
                self.shufflers[rank].begin_step(shuffle, self.points.append)
            self.check_rank(rank)
            staged = self.shufflers[rank].poll(1, 1)
            if staged is not None:
                assert run.staged(staged)
        self.deliver(run)
        if committed is not None:
            layer, row = committed
            self.placement[layer] = row
        for rank in range(len(self.shufflers)):
            run.step_done(rank, self.step)
        self.deliver(run)
        self.step += 1

    def finish(self, run: ShuffleRun, steps: int = 2000) -> None:
        """Steps until the run is over."""
        while not run.over and steps:
            steps -= 1
            self.run_step(run)
        assert run.over, "the run does not come to an end"
        self.run_step(run)  # what the last word of a rank was about

    # --------------------------------------------------------------------------------------------------------- checks

    def check_rank(self, rank: int) -> None:
        """Every slot computes with the expert that it is said to hold, and routing agrees with that."""
        for layer in self.layers[rank]:
            for slot, number in enumerate(layer.held.tolist()):
                assert is_expert(layer.weights(slot), layer.number, number), (rank, layer.number, slot)
                assert layer.canary[slot] == canary_of(layer.number, number)
                experts = layer.moe.experts
                of_product = experts._gate_up_of[slot], experts._down_of[slot]
                assert [one.data_ptr() for one in of_product] == [one.data_ptr() for one in layer.weights(slot)]
            routing = layer.moe.routing
            assert (routing.first_slot, routing.end_slot) == (self.starts[rank], self.starts[rank + 1])
            mine = {e: s for s, e in enumerate(layer.held.tolist(), self.starts[rank])}
            chosen = routing.choose(torch.tensor([list(mine)]), self.step)
            assert chosen.tolist() == [list(mine.values())], "a copy on the rank itself is passed by"

    def check_all(self) -> None:
        """All ranks agree on the placement, and nothing is left in buffers."""
        for rank, layers in enumerate(self.layers):
            self.check_rank(rank)
            assert not self.shufflers[rank].pending
            for layer in layers:
                assert layer.held.tolist() == self.own(self.placement[layer.number], rank)
                assert not self.shufflers[rank].moves(layer)
                for slot in range(layer.num_slots):
                    assert layer.weights(slot)[0].data_ptr() == layer.row(slot)[0].data_ptr()
        assert not any(self.office.boxes.values())
        for number in range(LAYERS):
            assert len({layers[number].generation for layers in self.layers}) == 1, "a mixed layer"

    def least_bytes(self, before: I32Matrix, after: I32Matrix) -> int:
        """Bytes of each expert that a rank needs and does not have, once."""
        lacking = [
            len(set(self.own(after[layer], rank)) - set(self.own(before[layer], rank)))
            for layer in range(LAYERS)
            for rank in range(len(self.slots))
        ]
        return sum(lacking) * sum(part.nbytes for part in expert(0, 0, self.dtype))
