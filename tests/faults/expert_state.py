"""What stands in the expert slots of a running engine, by the ranks themselves, against what the engine says."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import msgspec
import numpy as np

from drumline.engine.client import AsyncEngine
from drumline.engine.testing.shuffling import turned
from drumline.protocol.errors import DrumlineError
from drumline.protocol.messages import I32Matrix
from drumline.protocol.status import EngineStatus

AT_REST_S = 30.0
CANARY_OF_LAYER = 1 << 32
EXTENSION = "tests.faults.expert_digests.ExpertDigests"
"""The ranks of an engine whose experts are looked at need it."""


@dataclass(frozen=True)
class ExpertState:
    """``placement``: int32 (MoE layers, slots), as the engine says. ``slots``: how many each ep rank has."""

    placement: I32Matrix
    slots: tuple[int, ...]

    @property
    def turned(self) -> I32Matrix:
        """Another placement, for which most experts of every other layer travel."""
        other = self.placement.copy()
        other[::2] = turned(self.placement[::2], self.slots)
        return other


class LayerState(msgspec.Struct, array_like=True, frozen=True):
    """What a rank says of one MoE layer. The canary of a slot came with the weights that are there."""

    layer: int
    generation: int
    held: list[int]
    canaries: list[int]


@dataclass
class ExpertWatch:
    """Looks at the experts of one engine. ``known``: the checksum of each expert, by layer and expert, as it was when
    it was first seen."""

    engine: AsyncEngine
    known: dict[tuple[int, int], int] = field(default_factory=dict)

    async def at_rest(self, seconds: float = AT_REST_S) -> EngineStatus:
        """Wait until every rank is ready and no plan is made or carried out."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                status = await self.engine.status()
            except DrumlineError as error:
                if not error.retryable:
                    raise
            else:
                whole = status.state == "ready" and all(rank.state == "ready" for rank in status.ranks)
                if whole and status.eplb is not None and status.eplb.state == "idle":
                    return status
            assert time.monotonic() < deadline, "the experts do not come to rest"
            await asyncio.sleep(0.02)

    async def look(self) -> ExpertState:
        """Every slot of every rank holds the expert that the engine's placement says, and its weights bit for bit, in
        the same generation of its layer on all ranks."""
        status = await self.at_rest()
        placement = (await self.engine.expert_load()).physical_to_logical
        place = {rank.rank: rank.ep_rank for rank in status.ranks}
        layers: dict[int, dict[int, LayerState]] = {}
        for rank, value in (await self._ask("expert_state")).items():
            for one in msgspec.convert(value, list[LayerState]):
                layers.setdefault(one.layer, {})[place[rank]] = one
        assert sorted(layers) == list(range(len(placement)))
        slots: set[tuple[int, ...]] = set()
        for layer, by_place in layers.items():
            states = [state for _, state in sorted(by_place.items())]
            assert len({state.generation for state in states}) == 1, f"layer {layer} is mixed: {states}"
            assert [one for state in states for one in state.held] == placement[layer].tolist(), f"layer {layer}"
            for state in states:
                assert state.canaries == [layer * CANARY_OF_LAYER + expert for expert in state.held], state
            slots.add(tuple(len(state.held) for state in states))
        (share,) = slots
        await self._weights_are_theirs(place, layers)
        await self._layout_agrees(placement, share)
        return ExpertState(placement, share)

    async def _ask(self, method: str) -> dict[int, object]:
        replies = await self.engine.collective_rpc(method)
        assert all(reply.ok for reply in replies), replies
        return {reply.rank: reply.value for reply in replies}

    async def _weights_are_theirs(self, place: dict[int, int], layers: dict[int, dict[int, LayerState]]) -> None:
        for rank, value in (await self._ask("expert_digests")).items():
            for layer, digests in msgspec.convert(value, list[tuple[int, list[int]]]):
                held = layers[layer][place[rank]].held
                for expert, digest in zip(held, digests, strict=True):
                    expected = self.known.setdefault((layer, expert), digest)
                    assert digest == expected, f"rank {rank} has other weights for expert {expert} of layer {layer}"

    async def _layout_agrees(self, placement: I32Matrix, slots: tuple[int, ...]) -> None:
        starts = np.cumsum([0, *slots])
        layout = await self.engine.layout()
        moe_layers = layout.model.moe_layers
        for rank in layout.ranks:
            mine = slice(starts[rank.ep_rank], starts[rank.ep_rank + 1])
            for layer, experts in rank.experts.items():
                assert experts == tuple(sorted(set(placement[moe_layers.index(layer), mine].tolist())))
