"""All routed experts of one rank, from epoch to epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import ProtocolError
from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32, NO_NUMBERS, I32Matrix
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.protocol.shards import RankShards, layer_split, rank_shards
from drumline.workers.collectives import Group
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.expert_layer import EMPTY, ExpertLayer, loads
from drumline.workers.experts.moves import CHECKPOINT, Move, bring, check_moves, read_moves
from drumline.workers.experts.reading import ExpertReader
from drumline.workers.experts.shuffler import Shuffler
from drumline.workers.layers import MoeLayer, RoutingView
from drumline.workers.models import ModelBuild

Check = Callable[[], None]


class RankExperts:
    """What a rank holds of the experts of its stage, and how that becomes what an epoch wants.

    With expert parallel slots get other experts, from other ranks or the checkpoint, and layers other numbers of slots;
    without it every layer is cut anew from the checkpoint when the number of ranks changes. Whatever ends a
    :meth:`refit` early, :meth:`held` says what is there, and the next one goes on from that.
    """

    def __init__(
        self,
        spec: ModelSpec,
        world: Layout,
        me: int,
        layers: Sequence[ExpertLayer],
        reader: ExpertReader,
        device: torch.device,
        staging: bool = False,
    ) -> None:
        """``me``: the rank within ``world``; ``layers``: of its stage, as they were loaded. ``staging``: whether
        experts may move between steps."""
        self.layers = tuple(layers)
        self._spec = spec
        self._world = world
        self._me = me
        self._reader = reader
        self._device = device
        spans = layer_split(spec.num_layers, world.pipeline_parallel_size, world.pipeline_partition)
        self._layer_stage = tuple(
            next(stage for stage, (first, end) in enumerate(spans) if first <= layer < end) for layer in spec.moe_layers
        )
        #: What moves between steps; None where nothing does.
        self.shuffler: Shuffler | None = None
        if staging and self.whole:
            self.shuffler = Shuffler(self.layers, spec.num_experts, me)

    @classmethod
    def loaded(
        cls, build: ModelBuild, moe_layers: Sequence[MoeLayer], index: CheckpointIndex, staging: bool = False
    ) -> RankExperts:
        """Those of a model that has just been loaded; ``moe_layers``: of its stage. ``staging``: with buffers for
        experts that come while steps run."""
        spec, span = build.spec, build.shards.expert_mlp
        here = [layer for layer in spec.moe_layers if build.shards.layers[0] <= layer < build.shards.layers[1]]
        layers = []
        for moe, layer in zip(moe_layers, here, strict=True):
            number = spec.moe_layers.index(layer)
            layers.append(ExpertLayer(moe, number, layer, build.local_experts(number), span))
        return cls(spec, build.layout, build.rank, layers, ExpertReader(build.weights, index), build.device, staging)

    @property
    def whole(self) -> bool:
        """Whether ranks hold whole experts, some of them each."""
        return self._spec.is_moe and self._world.enable_expert_parallel

    @property
    def load(self) -> Tensor:
        """Tokens that each slot has computed since its expert came, int64 (layers of the stage, slots)."""
        return loads(self.layers, self._device)

    def held(self) -> I32Matrix:
        """int32 (moe_layers, slots): the expert that stands in each slot now, -1 for none and in layers of other
        stages, and behind the slots as many columns as :attr:`num_spare` with what stands outside of them; (0, 0) where
        every rank has all experts."""
        if not self.whole:
            return np.zeros((0, 0), dtype=np.int32)
        width = max((layer.num_slots for layer in self.layers), default=0)
        held = np.full((len(self._layer_stage), width + self.num_spare), EMPTY, dtype=np.int32)
        for layer in self.layers:
            held[layer.number, : layer.num_slots] = layer.held
            for place, (expert, _) in enumerate(layer.spares, layer.first_spare):
                held[layer.number, place] = expert
        return held

    @property
    def num_spare(self) -> int:
        """Experts that stand outside of the slots since the epoch was left."""
        return max((len(layer.spares) for layer in self.layers), default=0)

    def leave(self) -> None:
        """Nothing moves between steps any more. What is outside of the slots can be copied from in the next refit."""
        if self.shuffler is not None:
            self.shuffler.close()
            width = max((layer.num_slots for layer in self.layers), default=0)
            for layer in self.layers:
                # A refit that ended in the middle leaves layers of different widths.
                layer.spares, layer.first_spare = self.shuffler.spares(layer), width

    def moving_ranks(self, epoch: EpochPlace, placement: I32Matrix, slots: I32, fetches: I32Matrix) -> frozenset[int]:
        """The ranks of this stage that give each other experts; arguments and errors as of :meth:`refit`."""
        if not self.whole or not len(fetches):
            return frozenset()
        here = {layer.number for layer in self.layers}
        moves = self._moves(epoch, self._maps(epoch, placement, slots), fetches)
        travel = [move for move in moves if move.number in here and move.source not in (CHECKPOINT, move.target)]
        return frozenset(rank for move in travel for rank in (move.source, move.target))

    def refit(
        self,
        epoch: EpochPlace,
        placement: I32Matrix,
        slots: I32,
        fetches: I32Matrix,
        transfer: Group | None,
        check: Check,
        nodes: I32 = NO_NUMBERS,
    ) -> None:
        """Bring the experts of ``epoch`` into place and route by them; arguments as in Configure.

        ``transfer``: the group of the ranks that give each other experts, where this rank is one of them. ``check`` is
        called between experts, and what it raises ends the refit. Raises, before anything is changed, InvalidConfig for
        a placement that cannot be and ProtocolError for one that nothing brings about; later InvalidConfig for a
        checkpoint that cannot be read, and EpochAborted, PeerLost, GroupTimeout.
        """
        if not self._spec.is_moe:
            return
        maps = self._maps(epoch, placement, slots)
        moves = self._moves(epoch, maps, fetches)
        shards = None if epoch.parked else rank_shards(epoch.layout, self._spec, epoch.rank)
        if self.whole:
            self._bring_whole(maps, moves, shards, transfer, check)
        elif shards is not None:
            self._cut_anew(maps, shards, check)
        if shards is None:
            return
        sharded = epoch.layout.expert_group_size > 1 and not self.whole
        near = nodes_of_stage(epoch, nodes)
        for layer in self.layers:
            layer.moe.routing = RoutingView.of(maps, layer.number, shards.ep_rank, self._device, near)
            layer.moe.sharded = sharded

    def _maps(self, epoch: EpochPlace, placement: I32Matrix, slots: I32) -> PlacementMaps:
        maps = PlacementMaps.build(placement, self._spec.num_experts, epoch.layout.ep_size, slots)
        if len(maps.physical_to_logical) != len(self._layer_stage):
            found = f"a placement of {len(maps.physical_to_logical)} layers"
            raise ProtocolError(f"{found}; the model has {len(self._layer_stage)} MoE layers")
        return maps

    def _moves(self, epoch: EpochPlace, maps: PlacementMaps, fetches: I32Matrix) -> tuple[Move, ...]:
        return read_moves(epoch, maps, self._layer_stage, fetches) if self.whole else ()

    # ------------------------------------------------------------------------------------------------- whole experts

    def _bring_whole(
        self,
        maps: PlacementMaps,
        moves: Sequence[Move],
        shards: RankShards | None,
        transfer: Group | None,
        check: Check,
    ) -> None:
        """First everything that ranks give each other, layer by layer, so that nobody waits for another one's disk;
        then what comes out of the checkpoint."""
        by_layer: dict[int, list[Move]] = {layer.number: [] for layer in self.layers}
        for move in moves:
            if move.number in by_layer:
                by_layer[move.number].append(move)
        wanted: dict[int, I32 | None] = dict.fromkeys(by_layer)
        if shards is not None:
            own = maps.local_slots(shards.ep_rank)
            wanted = {number: maps.physical_to_logical[number, own.start : own.stop] for number in by_layer}
        for layer in self.layers:
            check_moves(layer, by_layer[layer.number], self._me, wanted[layer.number])
        for layer in self.layers:
            self._exchange(layer, by_layer[layer.number], wanted[layer.number], transfer, check)
        if shards is not None:
            for layer in self.layers:
                mine = [move for move in by_layer[layer.number] if move.target == self._me]
                self._complete(layer, mine, shards, check)

    def _exchange(
        self, layer: ExpertLayer, moves: Sequence[Move], wanted: I32 | None, transfer: Group | None, check: Check
    ) -> None:
        """All that the layer gives and gets is on its way or has come before any of its slots changes."""
        arrived = bring(layer, moves, self._me, transfer, check)
        if layer.spares or (self.shuffler is not None and self.shuffler.moves(layer)):
            layer.spares = []
            if self.shuffler is not None:
                self.shuffler.forget()
        if wanted is None:
            return
        layer.resize(len(wanted))
        for slot, weights in arrived.items():
            layer.write(slot, int(wanted[slot]), weights)

    def _complete(self, layer: ExpertLayer, moves: Sequence[Move], shards: RankShards, check: Check) -> None:
        """What only the checkpoint has, and second copies of what has come."""
        for move in sorted((move for move in moves if move.source == CHECKPOINT), key=lambda move: move.expert):
            target = (move.expert, *layer.empty(move.slot))
            self._reader.read(shards, layer.layer, [target], check)
            layer.filled(move.slot, move.expert)
        for move in moves:
            if int(layer.held[move.slot]) != move.expert:
                layer.write(move.slot, move.expert, layer.weights(move.source_slot))

    # ----------------------------------------------------------------------------------------- channels of all experts

    def _cut_anew(self, maps: PlacementMaps, shards: RankShards, check: Check) -> None:
        """The channels that this rank now has of every expert, where it has others; one layer after the other, so that
        there is never more than one twice."""
        for layer in self.layers:
            if not np.array_equal(maps.physical_to_logical[layer.number], layer.held):
                raise ProtocolError(f"without expert parallel the slots of MoE layer {layer.number} cannot change")
        for layer in self.layers:
            if layer.span == shards.expert_mlp:
                continue
            gate_up, down = layer.recut_room(shards.expert_mlp)
            targets = [(expert, gate_up[slot], down[slot]) for slot, expert in enumerate(layer.held.tolist())]
            self._reader.read(shards, layer.layer, targets, check)
            layer.replace(gate_up, down, shards.expert_mlp)


def nodes_of_stage(epoch: EpochPlace, nodes: I32) -> list[int]:
    """The numbers of the hosts of the ranks of this rank's stage, by ep rank, from those of all members."""
    if not len(nodes) or epoch.parked:
        return []
    return [int(nodes[place]) for place in epoch.layout.expert_group(epoch.rank)]
