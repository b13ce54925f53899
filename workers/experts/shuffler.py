"""Experts that move beside the steps of one rank: what it is told of them, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.messages import CancelStage, Shuffle, Staged, StageExperts
from drumline.protocol.placement import PlacementMaps
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.expert_layer import ExpertLayer, ExpertWeights
from drumline.workers.experts.load_reports import LoadReports
from drumline.workers.experts.moves import CHECKPOINT, Move, move_of
from drumline.workers.experts.staged_layer import StagedLayer
from drumline.workers.experts.staging_pool import StagingPool
from drumline.workers.groups.coordinator import GroupCoordinator
from drumline.workers.layers import RoutingView

Reach = Callable[[str], None]


class Shuffler:
    """The layers of this rank's stage, one of which may be under way. Between epochs it does nothing.

    ``pool``: the memory that experts come to, None in a stage without MoE layers. ``load``: what is reported of the
    tokens of each slot.
    """

    def __init__(self, layers: Sequence[ExpertLayer], num_experts: int, me: int) -> None:
        self._layers = tuple(layers)
        self._num_experts = num_experts
        self._me = me
        self.pool = StagingPool.for_layers(self._layers)
        self.load = LoadReports(self._layers)
        self._place: EpochPlace | None = None
        self._slots: Sequence[int] = ()
        self._nodes: Sequence[int] = ()
        self._group: GroupCoordinator | None = None
        self._stage: StagedLayer | None = None
        self._maps: PlacementMaps | None = None
        self._newest = 0

    # --------------------------------------------------------------------------------------------------------- epochs

    def open(
        self, place: EpochPlace, slots: Sequence[int], nodes: Sequence[int], group: GroupCoordinator | None
    ) -> None:
        """An epoch begins, in which ``group`` carries experts between the ranks of this stage that compute, and
        ``slots`` says how many slots each has (none: evenly)."""
        self._place, self._slots, self._nodes, self._group = place, tuple(slots), tuple(nodes), group
        self._newest = 0
        for layer in self._layers:
            layer.generation = 0
        if self.pool is not None and self.pool.size < max(layer.num_slots for layer in self._layers):
            self.pool = None  # the old one goes before the new one comes
            self.pool = StagingPool.for_layers(self._layers)
        self.load.begin()

    def close(self) -> None:
        """The epoch is over: nothing moves any more. What is spare stays until :meth:`forget`."""
        self._place = None
        self._group = None

    def forget(self) -> None:
        """What is committed goes home, everything else that is outside of the slots is gone."""
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.settle()

    def spares(self, layer: ExpertLayer) -> list[tuple[int, ExpertWeights]]:
        """Whole experts of ``layer`` outside of its slots, and their memory."""
        return self._stage.spares() if self._stage is not None and self.moves(layer) else []

    def moves(self, layer: ExpertLayer) -> bool:
        """Whether ``layer`` is under way."""
        return self._stage is not None and self._stage.layer is layer

    # --------------------------------------------------------------------------------------------------------- orders

    def stage(self, message: StageExperts) -> bool:
        """A layer is to get other experts. False for an order that has been taken before. Raises ProtocolError, before
        anything is changed, where it cannot be."""
        place, pool, name = self._place, self.pool, f"generation {message.generation}"
        if place is None or pool is None or place.parked:
            raise ProtocolError(f"{name} found a rank that moves no experts")
        if message.generation == self._newest:
            return False
        if message.generation < self._newest:
            raise ProtocolError(f"{name} found after {self._newest}; valid: ascending ones")
        if self._stage is not None:
            raise ProtocolError(f"{name} found {self._stage.generation} under way")
        layer = next((one for one in self._layers if one.number == message.layer), None)
        if layer is None:
            numbers = [one.number for one in self._layers]
            raise ProtocolError(f"{name} of MoE layer {message.layer}; this rank's stage has {numbers}")
        maps = self._maps_of(message, place)
        rounds = _rounds(message, _moves(message, maps, place))
        own = maps.local_slots(_ep_rank(place))
        wanted = maps.physical_to_logical[0, own.start : own.stop]
        self._stage = StagedLayer(message, rounds, wanted, layer, self._me, pool)
        self._newest = message.generation
        self._maps = maps
        return True

    def _maps_of(self, message: StageExperts, place: EpochPlace) -> PlacementMaps:
        """Those of one layer."""
        placement = np.asarray(message.placement).reshape(1, -1)
        try:
            return PlacementMaps.build(placement, self._num_experts, place.layout.ep_size, self._slots)
        except InvalidConfig as error:
            raise ProtocolError(f"generation {message.generation} of MoE layer {message.layer}: {error.text}") from None

    def cancel(self, message: CancelStage) -> bool:
        """The stage is given up. False for one that has been dropped already. Raises ProtocolError for one that is
        committed."""
        if self._stage is None and message.generation == self._newest:
            return False
        stage = self._of(message.generation)
        if stage.committed:
            raise ProtocolError(f"generation {message.generation} is to be cancelled and is committed")
        stage.dropping = True
        stage.told = False
        return True

    def begin_step(self, shuffle: Shuffle, reach: Reach) -> None:
        """What a step carries, before the model runs. ``reach`` is told of the points ``commit`` and ``staging``.

        Raises ProtocolError for what cannot be; where there are several pipeline stages a rank without a layer under
        way takes it for another stage's.
        """
        place = self._place
        if place is not None and self._stage is None and place.layout.pipeline_parallel_size > 1:
            return
        stage = self._of(shuffle.generation)
        if shuffle.commit:
            stage.commit()
            self.load.recount(stage.layer)
            self._route(stage.layer)
            reach("commit")
        if shuffle.end > shuffle.first:
            stage.start(shuffle.first, shuffle.end, self._group)
            reach("staging")
        if shuffle.home_end > shuffle.home_first and stage.go_home(shuffle.home_first, shuffle.home_end):
            self._stage = None

    def _of(self, generation: int) -> StagedLayer:
        if self._stage is None or self._stage.generation != generation:
            under_way = "none" if self._stage is None else f"{self._stage.generation}"
            raise ProtocolError(f"generation {generation} is not under way; valid: {under_way}")
        return self._stage

    def _route(self, layer: ExpertLayer) -> None:
        if self._place is not None and self._maps is not None:
            rank, device = _ep_rank(self._place), layer.moe.experts.down.device
            layer.moe.routing = RoutingView.of(self._maps, 0, rank, device, self._nodes)

    # --------------------------------------------------------------------------------------------------------- answers

    @property
    def pending(self) -> bool:
        """Whether something is under way, or there is something to say."""
        stage = self._stage
        return stage is not None and not stage.told and (stage.pending or stage.whole or stage.dropping)

    def poll(self, term: int, epoch: int) -> Staged | None:
        """Take in what has come; the word that all of it has, once. Waits for nobody. Raises ProtocolError, PeerLost,
        EpochAborted."""
        stage = self._stage
        if stage is None or stage.told or self._place is None:
            return None
        stage.poll(self._group)
        if stage.pending or not (stage.whole or stage.dropping):
            return None
        stage.told = True
        seconds = time.monotonic() - stage.started_at
        if stage.dropping:
            self._stage = None
        received = 0 if stage.dropping else stage.bytes_received
        return Staged(term, epoch, self._me, stage.generation, received, seconds, stage.dropping)


def _ep_rank(place: EpochPlace) -> int:
    return place.layout.ep_rank(place.rank)


def _moves(message: StageExperts, maps: PlacementMaps, place: EpochPlace) -> list[Move]:
    """The moves in order; all of them between ranks of this stage."""
    ranks = place.world_ranks(place.layout.expert_group(place.rank))
    moves = []
    for number, physical, source, source_slot in np.asarray(message.fetches).tolist():
        if number != message.layer or source == CHECKPOINT:
            raise ProtocolError(f"moves of other layers, or from the checkpoint, among those of layer {message.layer}")
        if not 0 <= physical < maps.num_slots or source not in ranks or source_slot < 0:
            found = f"an expert for slot {physical} from slot {source_slot} of rank {source}"
            raise ProtocolError(f"{found}; valid: slots below {maps.num_slots}, ranks {list(ranks)}")
        moves.append(move_of(number, maps, 0, ranks, physical, source, source_slot))
    return moves


def _rounds(message: StageExperts, moves: Sequence[Move]) -> tuple[tuple[Move, ...], ...]:
    bounds = np.asarray(message.rounds).tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(moves) or sorted(bounds) != bounds:
        raise ProtocolError(f"rounds {bounds} do not share out {len(moves)} moves")
    return tuple(tuple(moves[first:end]) for first, end in pairwise(bounds))
