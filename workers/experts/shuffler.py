"""Experts that move beside the steps of one rank: what it is told of them, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import NO_MATRIX, CancelStage, I32Matrix, Shuffle, Staged, StageExperts
from drumline.protocol.placement import PlacementMaps
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.expert_layer import ExpertLayer
from drumline.workers.experts.moves import read_moves
from drumline.workers.experts.staged_layer import StagedLayer, held_of
from drumline.workers.experts.staging_pool import StagingPool
from drumline.workers.groups.coordinator import GroupCoordinator
from drumline.workers.layers import RoutingView

Reach = Callable[[str], None]


class Shuffler:
    """The layers of this rank's stage, one of which may be under way. Between epochs it does nothing."""

    def __init__(self, layers: Sequence[ExpertLayer], layer_stage: Sequence[int], num_experts: int, me: int) -> None:
        self._layers = tuple(layers)
        self._layer_stage = tuple(layer_stage)
        self._num_experts = num_experts
        self._me = me
        self.pool = StagingPool.for_layers(self._layers)
        self._place: EpochPlace | None = None
        self._slots: Sequence[int] = ()
        self._nodes: Sequence[int] = ()
        self._group: GroupCoordinator | None = None
        self._stage: StagedLayer | None = None
        self._held_before = np.zeros(0, dtype=np.int32)
        self._seen = 0
        self._reported: Tensor | None = None
        self._steps = 0

    # --------------------------------------------------------------------------------------------------------- epochs

    def open(
        self, place: EpochPlace, slots: Sequence[int], nodes: Sequence[int], group: GroupCoordinator | None
    ) -> None:
        """An epoch begins, in which ``group`` carries experts between the ranks of this stage that compute."""
        self._place, self._slots, self._nodes, self._group = place, tuple(slots), tuple(nodes), group
        self._seen = self._steps = 0
        if self.pool is not None and self._stage is None:
            # A rank may have got slots of one that was lost.
            self.pool.fit(max(layer.num_slots for layer in self._layers))
        for layer in self._layers:
            layer.generation = 0
        self._reported = self._counts()

    def close(self) -> None:
        """The epoch is over: nothing moves any more. What is spare stays until :meth:`forget`."""
        self._place = None
        self._group = None

    def forget(self) -> None:
        """What is committed goes home, everything else that is outside of the slots is gone."""
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.settle()
            stage.release()

    def spares(self, layer: ExpertLayer) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """Whole experts of ``layer`` outside of its slots, and their memory."""
        stage = self._stage
        return stage.spares(self._held_before) if stage is not None and stage.layer is layer else []

    def moves(self, layer: ExpertLayer) -> bool:
        """Whether ``layer`` is under way."""
        return self._stage is not None and self._stage.layer is layer

    # --------------------------------------------------------------------------------------------------------- orders

    def stage(self, message: StageExperts) -> None:
        """A layer is to get other experts. Raises ProtocolError, before anything is changed, where it cannot."""
        place, pool = self._place, self.pool
        if place is None or pool is None or place.parked:
            raise ProtocolError(f"generation {message.generation} found a rank that moves no experts")
        if self._stage is not None:
            raise ProtocolError(f"generation {message.generation} found {self._stage.generation} under way")
        layer = next((one for one in self._layers if one.number == message.layer), None)
        if layer is None:
            raise ProtocolError(f"MoE layer {message.layer} is not of this rank's stage")
        rows = np.zeros((len(self._layer_stage), len(message.placement)), dtype=np.int32)
        rows[:] = np.arange(len(message.placement)) % self._num_experts
        rows[message.layer] = message.placement
        maps = PlacementMaps.build(rows, self._num_experts, place.layout.ep_size, self._slots)
        moves = read_moves(place, maps, self._layer_stage, message.fetches)
        bounds = message.rounds.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != len(moves) or sorted(bounds) != bounds:
            raise ProtocolError(f"rounds {bounds} do not share out {len(moves)} moves")
        if any(move.number != message.layer or move.source < 0 for move in moves):
            raise ProtocolError(f"moves of other layers, or from the checkpoint, among those of layer {message.layer}")
        own = maps.local_slots(self._ep_rank(place))
        wanted = maps.physical_to_logical[message.layer, own.start : own.stop]
        rounds = tuple(moves[first:end] for first, end in pairwise(bounds))
        self._held_before = held_of(layer)
        self._stage = StagedLayer(message, rounds, wanted, layer, self._me, pool)
        self._seen = message.generation
        self._maps = maps

    @staticmethod
    def _ep_rank(place: EpochPlace) -> int:
        return place.layout.ep_rank(place.rank)

    def cancel(self, message: CancelStage) -> None:
        """The stage is given up. Raises ProtocolError for one that is committed."""
        stage = self._of(message.generation)
        if stage.committed:
            raise ProtocolError(f"generation {message.generation} is to be cancelled and is committed")
        stage.dropping = True
        stage.told = False

    def begin_step(self, shuffle: Shuffle, reach: Reach) -> None:
        """What a step carries, before the model runs. Raises ProtocolError for what cannot be. ``reach``: is told of
        the points ``commit`` and ``staging``."""
        if self._stage is None and len(set(self._layer_stage)) > 1:
            return  # of a layer of another stage
        stage = self._of(shuffle.generation)
        if shuffle.commit:
            stage.commit()
            self._recount(stage.layer)
            self._route(stage.layer)
            reach("commit")
        if shuffle.end > shuffle.first:
            stage.start(shuffle.first, shuffle.end, self._group)
            reach("staging")
        if shuffle.home_end > shuffle.home_first and stage.go_home(shuffle.home_first, shuffle.home_end):
            stage.release()
            self._stage = None

    def _of(self, generation: int) -> StagedLayer:
        if self._stage is None or self._stage.generation != generation:
            under_way = "none" if self._stage is None else f"{self._stage.generation}"
            raise ProtocolError(f"generation {generation} is not under way; valid: {under_way}")
        return self._stage

    def _route(self, layer: ExpertLayer) -> None:
        place = self._place
        if place is not None:
            rank, device = self._ep_rank(place), layer.moe.experts.down.device
            layer.moe.routing = RoutingView.of(self._maps, layer.number, rank, device, self._nodes)

    # --------------------------------------------------------------------------------------------------------- answers

    @property
    def pending(self) -> bool:
        """Whether something is under way, or there is something to say."""
        stage = self._stage
        return stage is not None and not stage.told and (stage.pending or stage.whole or stage.dropping)

    def poll(self, term: int, epoch: int) -> Staged | None:
        """Take in what has come; the word that all of it has, once. Raises ProtocolError, PeerLost, EpochAborted."""
        stage = self._stage
        if stage is None or stage.told or self._place is None:
            return None
        stage.poll()
        if stage.pending or not (stage.whole or stage.dropping):
            return None
        stage.told = True
        seconds = time.monotonic() - stage.started_at
        if stage.dropping:
            stage.release()
            self._stage = None
        received = 0 if stage.dropping else stage.bytes_received
        return Staged(term, epoch, self._me, stage.generation, received, seconds, stage.dropping)

    # ------------------------------------------------------------------------------------------------------------ load

    def _counts(self) -> Tensor:
        width = max((layer.num_slots for layer in self._layers), default=0)
        if not self._layers:
            return torch.zeros(0, width, dtype=torch.int64)
        return torch.stack([layer.moe.experts.load for layer in self._layers])

    def count_step(self) -> None:
        """A step with tokens has run."""
        self._steps += 1

    def take_load(self) -> tuple[I32Matrix, int]:
        """Tokens that each slot has computed since the last call, int32 (layers of the stage, slots), and in how many
        steps."""
        if self._reported is None:
            return NO_MATRIX, 0
        counts, steps, self._steps = self._counts(), self._steps, 0
        since = (counts - self._reported).cpu().numpy().astype(np.int32)
        self._reported = counts
        return since, steps

    def _recount(self, layer: ExpertLayer) -> None:
        """Its counters were set anew."""
        if self._reported is not None:
            self._reported[self._layers.index(layer)] = layer.moe.experts.load
